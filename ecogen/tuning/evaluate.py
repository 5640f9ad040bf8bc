"""How well a whole model does on held-out examples, as an edge or the cloud measures what it aggregated."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping
from dataclasses import replace

from torch import Tensor
from torch.nn.functional import cross_entropy

from ecogen.models.family import whole_segment
from ecogen.models.vit import SegmentedViT
from ecogen.placement import Segment
from ecogen.planning.cost import ModelShape, activation_bytes, forward_flops
from ecogen.records import Score
from ecogen.runtime.stage import Stage
from ecogen.runtime.worker import Worker
from ecogen.tuning.passages import IGNORED, Batch, Passages, perplexity
from ecogen.units import MIB

logger = logging.getLogger(__name__)

_BATCH = 128
_LOGITS = 2**25  # numbers in the logits of a batch of passages, at most


class Evaluator:
    """Measures tunables on one split: accuracy on images, perplexity on text.

    What is frozen below them gives the same activations every time: they are computed once and kept, if there is room.

    Args:
        stage: the whole model.
        examples: None where nothing is to be evaluated.
        kept_bytes: of activations kept, at most.
    """

    def __init__(
        self, stage: Stage, shape: ModelShape, worker: Worker, examples: Batch | None, kept_bytes: int = 0
    ) -> None:
        self._stage, self._worker = stage, worker
        self._examples = examples.trimmed() if examples is not None and len(examples) else None
        model = stage.model
        # Whatever devices compute.
        self._shape = replace(shape, all_tokens=model.gives_all_tokens) if isinstance(model, SegmentedViT) else shape
        count, lowest = 0 if self._examples is None else len(self._examples), shape.lowest_tunable_block
        self._keeps = lowest > 0 and count * activation_bytes(self._shape, lowest) <= kept_bytes
        if lowest > 0 and count and not self._keeps:
            needed_mib = count * activation_bytes(self._shape, lowest) / MIB
            text = "what is frozen is computed anew in each evaluation; tuning.prefix_memory_mib = %d would keep it"
            logger.info(text, math.ceil(needed_mib))
        self._kept: dict[int, Tensor] = {}
        whole = whole_segment(model.whole.config)
        self._below = Segment(0, lowest, has_embedding=lowest > 0)
        self._above = replace(whole, start=lowest, has_embedding=lowest == 0)

    def __call__(self, tunables: Mapping[str, Tensor]) -> Score:
        """What the tunables reach; runs on the compute thread."""
        if self._examples is None:
            return Score()
        self._stage.begin(tunables)
        if isinstance(self._examples, Passages):
            return Score(perplexity=perplexity(self._loss(self._examples), self._examples))
        return Score(accuracy=self._sum(self._examples, _BATCH, _num_right) / len(self._examples))

    def _loss(self, passages: Passages) -> float:
        """Summed over all tokens that count."""
        return self._sum(passages, rows_at_once(passages, self._shape), _summed_loss)

    def _sum(self, examples: Batch, rows: int, measure: Callable[[Tensor, Tensor], float]) -> float:
        """A measure of outputs and labels, summed over all examples, so many rows at once."""
        return math.fsum(
            measure(self._outputs(examples.inputs[start : start + rows], start), examples.labels[start : start + rows])
            for start in range(0, len(examples), rows)
        )

    def _outputs(self, inputs: Tensor, start: int) -> Tensor:
        """Logits of a batch, on the CPU; `start` tells it from others."""
        activations = self._kept.get(start)
        if activations is None:
            activations = self._infer(self._below, inputs)
            if self._keeps:
                self._kept[start] = activations
        return self._infer(self._above, activations).cpu()

    def _infer(self, segment: Segment, inputs: Tensor) -> Tensor:
        shape = self._shape.seeing(inputs.shape[1])
        self._worker.meter.add_flops(forward_flops(shape, segment, len(inputs)))
        return self._stage.infer(segment, inputs)


def rows_at_once(passages: Passages, shape: ModelShape) -> int:
    """How many passages may be evaluated at once, so that their logits have room."""
    return max(1, min(_BATCH, _LOGITS // (passages.tokens.shape[1] * shape.num_labels)))


def _num_right(logits: Tensor, labels: Tensor) -> float:
    """How many have the right class as their most likely one."""
    return float((logits.argmax(-1) == labels).sum())


def _summed_loss(logits: Tensor, labels: Tensor) -> float:
    """Of a batch, summed."""
    return float(cross_entropy(logits.flatten(0, 1).float(), labels.flatten(), reduction="sum", ignore_index=IGNORED))
