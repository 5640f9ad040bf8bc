"""A decoder's training steps on two cores: each half of a batch has its gradient on a thread of its own.

It is always two halves, so that the model is the same on any number of cores. Each thread computes on one core: small
matrices gain less where every product is cut in two.

Shapes: B passages a batch, T tokens of a passage.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.optim import Optimizer
from transformers import PreTrainedModel

from ecogen.tuning.passages import IGNORED, Passages

THREADS = 2


class Workers:
    """Two threads; use it as a context, and they end with it."""

    def __enter__(self) -> Workers:
        self._threads = torch.get_num_threads()
        self._pool = ThreadPoolExecutor(THREADS, "training", initializer=torch.set_num_threads, initargs=(1,))
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown()
        torch.set_num_threads(self._threads)  # what one thread sets is what new ones begin with

    def backward(self, model: PreTrainedModel, passages: Passages) -> float:
        """The mean cross-entropy of the labels that count [B, T]; its gradients are put into the parameters."""
        parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        counted = (passages.labels != IGNORED).sum()
        halves = passages.trimmed().split(min(THREADS, len(passages)))

        def one(part: Passages) -> tuple[float, Sequence[Tensor]]:
            loss = _summed(model, part) / counted
            return loss.item(), torch.autograd.grad(loss, parameters)

        (loss, gradients), *others = self._pool.map(one, halves)
        for parameter, *of_parts in zip(parameters, gradients, *(each for _, each in others), strict=True):
            parameter.grad = torch.stack(of_parts).sum(0)
        return loss + sum(each for each, _ in others)

    def step(self, optimizers: Sequence[Optimizer]) -> None:
        """A step of each; they share no parameter."""
        for _ in self._pool.map(lambda optimizer: optimizer.step(), optimizers):
            pass


@contextmanager
def on_one_thread() -> Iterator[None]:
    """Each product is computed by one thread, so it has the same bits on any number of cores.

    Small ones gain little from more, and threads that wait for each other take the cores of whoever else works here.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _summed(model: PreTrainedModel, passages: Passages) -> Tensor:
    logits = model(input_ids=passages.tokens, use_cache=False).logits
    return cross_entropy(logits.flatten(0, 1), passages.labels.flatten(), ignore_index=IGNORED, reduction="sum")
