"""One segment of a decoder at work for many requests: runs a scheduler's steps on its slabs.

Not thread-safe: one compute thread calls it.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from ecogen.models.decoder import SegmentedDecoder, State
from ecogen.models.rows import Rows
from ecogen.models.slabs import SlabCache
from ecogen.placement import Segment
from ecogen.serving.scheduler import Step


class DecoderStage:
    """A held segment, with slabs for each group of requests.

    Args:
        num_groups: groups of slots that take turns.
        slots_per_group: requests that each has room for.
        max_tokens: the longest request, prompt and answer.
    """

    def __init__(
        self, model: SegmentedDecoder, segment: Segment, num_groups: int, slots_per_group: int, max_tokens: int
    ) -> None:
        self._model, self._segment = model, segment
        config = model.whole.config
        self._caches = [SlabCache(config, slots_per_group, max_tokens) for _ in range(num_groups)]

    @torch.inference_mode()
    def run(self, step: Step, received: State | None = None) -> State:
        """What the next stage needs: hidden states; or, of the last stage, logits [B, V] of each row's last token.

        Args:
            received: what the stage before gave; None where this one has the embedding.
        """
        cache = self._caches[step.group]
        for move in step.moves:
            cache.move(*move)
        first = torch.tensor(step.positions)[:, None]
        rows = Rows(step.first, first + torch.arange(len(step.tokens[0])))
        inputs = torch.tensor(step.tokens) if received is None else received
        given = cache.run(partial(self._forward, cache), inputs, rows)
        if not self._segment.has_head:
            return given
        assert isinstance(given, Tensor)
        return given[:, -1]

    def _forward(self, cache: SlabCache, inputs: State, positions: Tensor) -> State:
        given: State = self._model(inputs, self._segment, position_ids=positions, cache=cache, num_logits=1)
        return given

    @property
    def cache_bytes(self) -> int:
        """Of all slabs that were made."""
        return sum(cache.nbytes for cache in self._caches)
