"""What a model keeps of many requests at once: each request has a slot, a row of a slab for all that a layer keeps.

What runs together are neighbouring slots, so that attention reads a slab where it lies and nothing is gathered. Rows
may be of any length. A prompt may come in chunks: recurrent and convolution states go on from chunk to chunk, which
transformers' own kernels can; a step that has run must not run again, for it would change them twice.

Shapes: B rows that run together, T tokens of each, S the longest row's keys, H heads of keys, D their width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedConfig
from transformers.cache_utils import Cache, CacheLayerMixin, LinearAttentionCacheLayerMixin

from ecogen.errors import ServingError
from ecogen.models.decoder import State
from ecogen.models.rows import Rows, masked
from ecogen.models.states import States

_KINDS = {
    "DynamicLayer",
    "DynamicSlidingWindowLayer",
    "DynamicIndexedLayer",
    "MiniMaxM3VLSparseCacheLayer",
    "LinearAttentionLayer",
    "LinearAttentionAndFullAttentionLayer",
    "LinearAttentionAndSlidingWindowAttentionLayer",
}
"""The layers of transformers' caches that slabs can stand for; names, for one comes with its model's own file."""

_ONE_LENGTH = {"inkling_text"}
"""Model types whose attention takes its place from the cache's length, one for all rows: others run one by one."""


class SlabCache(Cache):
    """A cache of transformers over slabs, of those rows that `run` was given.

    Args:
        num_slots: how many requests it has room for.
        max_tokens: the longest request, prompt and answer.
    """

    def __init__(self, config: PreTrainedConfig, num_slots: int, max_tokens: int) -> None:
        layers = [_Slab(self, num_slots, max_tokens) for _ in _checked(config)]
        self._takes_any_lengths = config.model_type not in _ONE_LENGTH
        super().__init__(layers=layers)
        self.num_slots, self.max_tokens = num_slots, max_tokens
        self.rows: Rows | None = None
        self._states = States(num_slots)

    def run(self, forward: Callable[[State, Tensor], State], inputs: State, rows: Rows) -> State:
        """One step of a model's forward with this cache; what it gives.

        Args:
            forward: of inputs and positions [B, T]; called once, or for each row where the model wants one length.

        Raises:
            ServingError: if there is no room for the rows.
        """
        if rows.begin is not None or self._takes_any_lengths:
            with self._at(rows):
                return forward(inputs, rows.positions)
        assert isinstance(inputs, Tensor)  # what passes between such a model's blocks
        given = [self.run(forward, row, part) for row, part in zip(inputs.split(1), rows.apart(), strict=True)]
        return torch.cat([state for state in given if isinstance(state, Tensor)])

    def move(self, source: int, target: int, num_tokens: int) -> None:
        """A request goes to another slot."""
        for slab in self.layers:
            slab.move(source, target, num_tokens)
        self._states.move(source, target)

    @property
    def nbytes(self) -> int:
        """Of all slabs."""
        return self._states.nbytes + sum(slab.nbytes for slab in self.layers)

    @property
    def running(self) -> Rows:
        """What runs now."""
        assert self.rows is not None
        return self.rows

    def get_conv_state(self, layer_idx: int, state_idx: int = 0) -> Tensor | None:
        """A convolution's last inputs, as `States.read` gives them."""
        return self._states.read(("convolution", layer_idx, state_idx), self.running)

    def get_recurrent_state(self, layer_idx: int, state_idx: int = 0) -> Tensor | None:
        """A recurrent state, as `States.read` gives it."""
        return self._states.read(("recurrent", layer_idx, state_idx), self.running)

    def update_conv_state(
        self, conv_states: Tensor, layer_idx: int, state_idx: int = 0, *, conv_kernel_size: int, **_: object
    ) -> Tensor:
        """A convolution's next inputs; see `States.append`."""
        name = ("convolution", layer_idx, state_idx)
        return self._states.append(name, self.running, conv_states, conv_kernel_size)

    def update_recurrent_state(
        self, recurrent_states: Tensor, layer_idx: int, state_idx: int = 0, **_: object
    ) -> Tensor:
        """A recurrent state's next value; see `States.write`."""
        return self._states.write(("recurrent", layer_idx, state_idx), self.running, recurrent_states)

    @contextmanager
    def _at(self, rows: Rows) -> Iterator[None]:
        if rows.stop > self.num_slots or rows.length > self.max_tokens:
            raise ServingError(
                f"slots up to {rows.stop} and {rows.length} tokens do not fit {self.num_slots} of {self.max_tokens}"
            )
        self._states.begin(rows)
        for slab in self.layers if rows.fresh else ():
            slab.begin(rows.fresh)
        self.rows = rows
        try:
            with masked(rows):
                yield
        finally:
            self.rows = None


class _Slab(CacheLayerMixin):
    """One layer's keys and values [slots, H, tokens, D], made when it writes first: never those of another node's.

    A layer whose attention looks at a few tokens only has a third slab, of the keys [slots, 1, tokens, D] by which it
    finds them.
    """

    is_sliding = False

    def __init__(self, cache: SlabCache, num_slots: int, max_tokens: int) -> None:
        super().__init__()
        self._cache, self._size = cache, (num_slots, max_tokens)
        self.indexer_keys: Tensor | None = None
        self._longest = 0

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.keys, self.values = self._make(key_states), self._make(value_states)
        self.is_initialized = True

    def _make(self, states: Tensor) -> Tensor:
        num_slots, max_tokens = self._size
        return states.new_zeros(num_slots, states.shape[1], max_tokens, states.shape[3])

    def update(self, key_states: Tensor, value_states: Tensor, *_: object, **__: object) -> tuple[Tensor, Tensor]:
        """Write [B, H, T, D] where the rows go on; returns the rows' keys and values [B, H, S, D]."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        return self._write(self.keys, key_states), self._write(self.values, value_states)

    def update_indexer(self, indexer_key_states: Tensor) -> Tensor:
        """As `update_index`, without the dimension of heads."""
        return self.update_index(indexer_key_states[:, None])[:, 0]

    def update_index(self, idx_k: Tensor) -> Tensor:
        """Write [B, 1, T, D] where the rows go on; returns the rows' [B, 1, S, D]."""
        if self.indexer_keys is None:
            self.indexer_keys = self._make(idx_k)
        return self._write(self.indexer_keys, idx_k)

    def _write(self, slab: Tensor, states: Tensor) -> Tensor:
        rows = self._rows
        self._longest = max(self._longest, rows.length)
        if rows.begin is None:
            slab[rows.slots, :, rows.positions] = states.transpose(1, 2)
        else:
            slab[rows.part, :, rows.begin : rows.length] = states
        return slab[rows.part, :, : rows.length]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self._rows.length, 0

    def get_seq_length(self) -> int:
        return self._rows.length - self._rows.num_tokens

    def get_max_length(self) -> int:
        return self._size[1]

    def begin(self, slots: Sequence[int]) -> None:
        """Forget what these slots held before: nobody looks at it, but nothing times what is no number is no number."""
        for slab in self._slabs:
            slab[slots, :, : self._longest] = 0

    def move(self, source: int, target: int, num_tokens: int) -> None:
        for slab in self._slabs:
            slab[target, :, :num_tokens] = slab[source, :, :num_tokens]
            slab[target, :, num_tokens : self._longest] = 0

    @property
    def nbytes(self) -> int:
        return sum(slab.nbytes for slab in self._slabs)

    @property
    def _slabs(self) -> list[Tensor]:
        return [slab for slab in (self.keys, self.values, self.indexer_keys) if slab is not None]

    @property
    def _rows(self) -> Rows:
        return self._cache.running


def has_states(config: PreTrainedConfig) -> bool:
    """Whether some layers keep states that have seen all tokens, rather than something of each of them."""
    return any(isinstance(layer, LinearAttentionCacheLayerMixin) for layer in _checked(config))


def _checked(config: PreTrainedConfig) -> Iterable[CacheLayerMixin]:
    """The layers of the model's own cache, if slabs can stand for them."""
    layers = DynamicCache(config=config).layers
    if strange := {type(layer).__name__ for layer in layers} - _KINDS:
        names = ", ".join(sorted(strange))
        raise ServingError(f"a {config.model_type!r} model keeps what slabs cannot hold ({names})")
    return layers
