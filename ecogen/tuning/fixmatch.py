"""FixMatch: what a model is sure of in a weak view of an unlabelled image is the label of a strong view of it.

Sohn et al. 2020, https://arxiv.org/abs/2001.07685, equations 3 and 4: with B labelled and U = mu B unlabelled examples,

    loss = 1/B sum_b H(p_b, p(weak(x_b))) + lambda_u 1/U sum_u 1(max q_u >= tau) H(argmax q_u, p(strong(x_u))),

where q_u = p(weak(x_u)) is the model's own prediction at that very step, through which no gradient flows.

A batch is one `Examples`: labelled rows, then the strong views, then the weak views of the same images in that order.
Weak views only predict: they go through the chain without a graph, and nothing comes back for them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ecogen.config import Unlabelled
from ecogen.errors import ProtocolError
from ecogen.tuning.data import Examples
from ecogen.tuning.passages import Batch

STRONG, WEAK = -1, -2
"""In place of the label of a view that has none."""


class Targets(NamedTuple):
    """What the rows [R] with a gradient should be, pseudo-labels put in.

    Attributes:
        weights: of each row's cross-entropy in B times the loss; None where all are 1.
        confident: the microbatch's share of the share of unlabelled examples with a pseudo-label.
    """

    labels: Tensor
    weights: Tensor | None = None
    confident: float = 0.0


def mixed_batch(labelled: Examples, strong: Tensor, weak: Tensor) -> Examples:
    """Labelled examples and two views [U, C, H, W] of unlabelled ones as one batch."""
    marks = torch.tensor([STRONG, WEAK]).repeat_interleave(len(strong))
    return Examples(torch.cat([labelled.images, strong, weak]), torch.cat([labelled.labels, marks]))


def cut_batch(batch: Batch, count: int) -> Sequence[Batch]:
    """A batch in at most `count` microbatches of nearly equal size, in order; all that is of one example in one."""
    if not isinstance(batch, Examples):
        return batch.split_examples(min(count, batch.num_examples))
    if bool((batch.labels >= 0).all()):
        return batch.split(min(count, len(batch)))
    groups = [torch.where(rows)[0] for rows in (batch.labels >= 0, batch.labels == STRONG, batch.labels == WEAK)]
    count = min(count, max(len(group) for group in groups))
    return [batch[torch.cat(part)] for part in zip(*(group.tensor_split(count) for group in groups), strict=True)]


def without_weak(inputs: Tensor, num_weak: int) -> tuple[Tensor, Tensor | None]:
    """A microbatch's rows with a gradient, and its weak views, if it has some.

    Raises:
        ProtocolError: if there are fewer rows.
    """
    if not num_weak:
        return inputs, None
    if num_weak > len(inputs):
        raise ProtocolError(f"{num_weak} weak views in a microbatch of {len(inputs)} rows")
    return inputs[:-num_weak].clone(), inputs[-num_weak:]  # cloned, so that its graph does not keep the weak views


def targets(
    labels: Tensor,
    num_rows: int,
    weak_logits: Tensor | None,
    spec: Unlabelled,
    batch_size: int,
    num_unlabelled: int,
) -> Targets:
    """Equation 4: the argmax of each weak view's prediction, where that is confident, for its strong view.

    Args:
        labels: [R + u], with marks, of a microbatch whose last u rows are weak views.
        num_rows: R, of the rows with a gradient.
        weak_logits: [u, L]; None where u is 0.
        batch_size: B, of the whole batch.
        num_unlabelled: U, of the whole batch.

    Raises:
        ProtocolError: if the labels do not fit these rows.
    """
    if labels.ndim > 1:  # text's, of which each row has many
        return _of_text(labels, num_rows)
    num_weak = 0 if weak_logits is None else len(weak_logits)
    _check(labels, num_rows, num_weak, num_unlabelled)
    if weak_logits is None:
        return Targets(labels)
    confidence, guesses = weak_logits.float().softmax(-1).max(-1)
    confident = confidence >= spec.threshold
    labels = labels[:num_rows].to(guesses.device, copy=True)
    strong, weights = labels == STRONG, torch.ones(num_rows, device=guesses.device)
    labels[strong] = guesses
    weights[strong] = confident * (spec.weight * batch_size / num_unlabelled)
    return Targets(labels, weights, int(confident.sum()) / num_unlabelled)


def _of_text(labels: Tensor, num_rows: int) -> Targets:
    if len(labels) != num_rows:
        raise ProtocolError(f"a microbatch of {num_rows} passages came with the labels of {len(labels)}")
    return Targets(labels)


def _check(labels: Tensor, num_rows: int, num_weak: int, num_unlabelled: int) -> None:
    known, strong, weak = (int(rows.sum()) for rows in (labels >= 0, labels == STRONG, labels[num_rows:] == WEAK))
    if not (
        known + strong == num_rows and strong == weak == num_weak <= num_unlabelled and len(labels) == num_rows + weak
    ):
        raise ProtocolError(
            f"a microbatch of {num_rows} rows and {num_weak} weak views, of a batch of {num_unlabelled}, "
            f"came with {len(labels)} labels, {strong} of strong and {weak} of weak views"
        )
