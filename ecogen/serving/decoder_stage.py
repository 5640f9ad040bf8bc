"""One segment of a decoder at work for many requests: runs a scheduler's steps on its slabs.

Not thread-safe: one compute thread calls it.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from functools import partial

import torch
from torch import Tensor

from ecogen.models.decoder import SegmentedDecoder, State
from ecogen.models.mixed_lora import MixedLora
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
        lora: the adapters that the model has; None for none.
    """

    def __init__(
        self,
        model: SegmentedDecoder,
        segment: Segment,
        num_groups: int,
        slots_per_group: int,
        max_tokens: int,
        lora: MixedLora | None = None,
    ) -> None:
        self._model, self._segment, self._lora = model, segment, lora
        self._device = next(model.parameters()).device
        config = model.whole.config
        self._caches = [SlabCache(config, slots_per_group, max_tokens) for _ in range(num_groups)]

    @torch.inference_mode()
    def run(self, step: Step, received: State | None = None, adapters: Sequence[str] = ()) -> State:
        """What the next stage needs: hidden states; or, of the last stage, logits [B, V] of each row's last token.

        Args:
            received: what the stage before gave; None where this one has the embedding.
            adapters: which one each row has; empty where none has any.
        """
        cache = self._caches[step.group]
        for move in step.moves:
            cache.move(*move)
        first = torch.tensor(step.positions, device=self._device)[:, None]
        rows = Rows(step.first, first + torch.arange(len(step.tokens[0]), device=self._device))
        inputs = torch.tensor(step.tokens, device=self._device) if received is None else self._here(received)
        with nullcontext() if self._lora is None else self._lora.rows(adapters):
            given = cache.run(partial(self._forward, cache), inputs, rows)
        if not self._segment.has_head:
            return given
        assert isinstance(given, Tensor)
        return given[:, -1]

    def _here(self, state: State) -> State:
        return state.to(self._device) if isinstance(state, Tensor) else tuple(part.to(self._device) for part in state)

    def _forward(self, cache: SlabCache, inputs: State, positions: Tensor) -> State:
        given: State = self._model(inputs, self._segment, position_ids=positions, cache=cache, num_logits=1)
        return given

    @property
    def cache_bytes(self) -> int:
        """Of all slabs that were made."""
        return sum(cache.nbytes for cache in self._caches)
