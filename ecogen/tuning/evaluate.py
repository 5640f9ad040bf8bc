"""Accuracy of a whole model on held-out examples, as an edge or the cloud measures what it aggregated."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from dataclasses import replace

from torch import Tensor

from ecogen.models.vit import whole_segment
from ecogen.placement import Segment
from ecogen.planning.cost import ModelShape, activation_bytes, forward_flops
from ecogen.runtime.stage import Stage
from ecogen.runtime.worker import Worker
from ecogen.tuning.data import Examples
from ecogen.units import MIB

logger = logging.getLogger(__name__)

_BATCH = 128


class Evaluator:
    """Measures tunables on one split.

    What is frozen below them gives the same activations every time: they are computed once and kept, if there is room.

    Args:
        stage: the whole model.
        examples: None where nothing is to be evaluated.
        kept_bytes: of activations kept, at most.
    """

    def __init__(
        self, stage: Stage, shape: ModelShape, worker: Worker, examples: Examples | None, kept_bytes: int = 0
    ) -> None:
        self._stage, self._worker, self._examples = stage, worker, examples
        self._shape = replace(shape, all_tokens=stage.model.gives_all_tokens)  # whatever devices compute
        count, lowest = 0 if examples is None else len(examples), shape.lowest_tunable_block
        self._keeps = lowest > 0 and count * activation_bytes(self._shape, lowest) <= kept_bytes
        if lowest > 0 and count and not self._keeps:
            needed_mib = count * activation_bytes(self._shape, lowest) / MIB
            text = "what is frozen is computed anew in each evaluation; tuning.prefix_memory_mib = %d would keep it"
            logger.info(text, math.ceil(needed_mib))
        self._kept: dict[int, Tensor] = {}
        whole = whole_segment(stage.model.whole.config)
        self._below = replace(whole, stop=lowest, has_head=False)
        self._above = replace(whole, start=lowest, has_embedding=False)

    def __call__(self, tunables: Mapping[str, Tensor]) -> float | None:
        """The share of examples whose most likely class is the right one; runs on the compute thread."""
        if self._examples is None or not len(self._examples):
            return None
        self._stage.begin(tunables)
        starts = range(0, len(self._examples), _BATCH)
        return sum(self._correct(start) for start in starts) / len(self._examples)

    def _correct(self, start: int) -> int:
        assert self._examples is not None
        labels = self._examples.labels[start : start + _BATCH]
        return int((self._infer(self._above, self._below_tunables(start)).argmax(-1).cpu() == labels).sum())

    def _below_tunables(self, start: int) -> Tensor:
        """What a batch gives below the lowest tunable block [B, T, D]."""
        assert self._examples is not None
        if start in self._kept:
            return self._kept[start]
        activations = self._infer(self._below, self._examples.images[start : start + _BATCH])
        if self._keeps:
            self._kept[start] = activations
        return activations

    def _infer(self, segment: Segment, inputs: Tensor) -> Tensor:
        self._worker.meter.add_flops(forward_flops(self._shape, segment, len(inputs)))
        return self._stage.infer(segment, inputs)
