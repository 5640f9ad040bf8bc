"""Accuracy of a whole model on held-out examples, as an edge or the cloud measures what it aggregated."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from ecogen.models.vit import whole_segment
from ecogen.planning.cost import ModelShape, forward_flops
from ecogen.runtime.stage import Stage
from ecogen.runtime.worker import Worker
from ecogen.tuning.data import Examples

_BATCH = 128


class Evaluator:
    """Measures tunables on one split.

    Args:
        stage: the whole model.
        examples: None where nothing is to be evaluated.
    """

    def __init__(self, stage: Stage, shape: ModelShape, worker: Worker, examples: Examples | None) -> None:
        self._stage, self._shape, self._worker, self._examples = stage, shape, worker, examples

    def __call__(self, tunables: Mapping[str, Tensor]) -> float | None:
        """The share of examples whose most likely class is the right one; runs on the compute thread."""
        if self._examples is None or not len(self._examples):
            return None
        self._stage.begin(tunables)
        starts = range(0, len(self._examples), _BATCH)
        return sum(self._correct(start) for start in starts) / len(self._examples)

    def _correct(self, start: int) -> int:
        assert self._examples is not None
        batch = slice(start, start + _BATCH)
        images, labels = self._examples.images[batch], self._examples.labels[batch]
        segment = whole_segment(self._stage.model.whole.config)
        self._worker.meter.add_flops(forward_flops(self._shape, segment, len(images)))
        return int((self._stage.infer(segment, images).argmax(-1).cpu() == labels).sum())
