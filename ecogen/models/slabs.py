"""Keys and values of many requests at once: each request has a slot, a row of a slab for each attention layer.

What runs together are neighbouring slots, so that attention reads a slab where it lies and nothing is gathered. Rows
may be of any length: where each of them is, transformers' masks are told through its own interface, so that windows,
chunks and soft caps stay the model's.

Shapes: B rows that run together, T tokens of each, S the longest row's keys, H heads of keys, D their width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedConfig
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicLayer, DynamicSlidingWindowLayer
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, eager_mask, sdpa_mask

from ecogen.errors import ServingError


class Rows:
    """Neighbouring slots in one step, and where each one's tokens go.

    Args:
        first: the first slot.
        positions: [B, T]; consecutive in each row.
    """

    def __init__(self, first: int, positions: Tensor) -> None:
        self.first, self.positions = first, positions
        self.stop = first + len(positions)
        starts = positions[:, 0].tolist()
        self.num_tokens = positions.shape[1]
        self.begin = starts[0] if min(starts) == max(starts) else None  # where all begin, if they do at one place
        self.length = max(starts) + self.num_tokens
        self.slots = torch.arange(first, self.stop, device=positions.device)[:, None]


class SlabCache(Cache):
    """A cache of transformers over slabs; `at` says which rows run.

    Args:
        num_slots: how many requests it has room for.
        max_tokens: the longest request, prompt and answer.
    """

    def __init__(self, config: PreTrainedConfig, num_slots: int, max_tokens: int) -> None:
        layers = [_Slab(self, num_slots, max_tokens) for _ in _checked(config)]
        super().__init__(layers=layers)
        self.num_slots, self.max_tokens = num_slots, max_tokens
        self.rows: Rows | None = None

    @contextmanager
    def at(self, rows: Rows) -> Iterator[None]:
        """Within it, a forward reads and writes those rows.

        Raises:
            ServingError: if there is no room for them.
        """
        if rows.stop > self.num_slots or rows.length > self.max_tokens:
            raise ServingError(
                f"slots up to {rows.stop} and {rows.length} tokens do not fit {self.num_slots} of {self.max_tokens}"
            )
        self.rows, token = rows, _rows.set(rows)
        try:
            yield
        finally:
            self.rows = None
            _rows.reset(token)

    def move(self, source: int, target: int, num_tokens: int) -> None:
        """A request goes to another slot."""
        for slab in self.layers:
            slab.move(source, target, num_tokens)

    @property
    def nbytes(self) -> int:
        """Of all slabs."""
        return sum(slab.nbytes for slab in self.layers)


class _Slab(CacheLayerMixin):
    """One layer's keys and values [slots, H, tokens, D], made when it writes first: never those of another node's."""

    is_sliding = False

    def __init__(self, cache: SlabCache, num_slots: int, max_tokens: int) -> None:
        super().__init__()
        self._cache, self._size = cache, (num_slots, max_tokens)

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        num_slots, max_tokens = self._size
        self.keys, self.values = (
            states.new_zeros(num_slots, states.shape[1], max_tokens, states.shape[3])
            for states in (key_states, value_states)
        )
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *_: object, **__: object) -> tuple[Tensor, Tensor]:
        """Write [B, H, T, D] where the rows go on; returns the rows' keys and values [B, H, S, D]."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        return self._write(self.keys, key_states), self._write(self.values, value_states)

    def _write(self, slab: Tensor, states: Tensor) -> Tensor:
        rows = self._rows
        if rows.begin is None:
            slab[rows.slots, :, rows.positions] = states.transpose(1, 2)
        else:
            slab[rows.first : rows.stop, :, rows.begin : rows.length] = states
        return slab[rows.first : rows.stop, :, : rows.length]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self._rows.length, 0

    def get_seq_length(self) -> int:
        return self._rows.length - self._rows.num_tokens

    def get_max_length(self) -> int:
        return self._size[1]

    def move(self, source: int, target: int, num_tokens: int) -> None:
        for slab in (self.keys, self.values) if self.is_initialized else ():
            slab[target, :, :num_tokens] = slab[source, :, :num_tokens]

    @property
    def nbytes(self) -> int:
        return self.keys.nbytes + self.values.nbytes if self.is_initialized else 0

    @property
    def _rows(self) -> Rows:
        assert self._cache.rows is not None
        return self._cache.rows


_rows: ContextVar[Rows | None] = ContextVar("rows that run", default=None)


def _checked(config: PreTrainedConfig) -> Iterable[CacheLayerMixin]:
    """The layers of the model's own cache, if slabs can stand for them."""
    layers = DynamicCache(config=config).layers
    kinds = {type(layer) for layer in layers}
    if strange := kinds - {DynamicLayer, DynamicSlidingWindowLayer}:
        names = ", ".join(sorted(kind.__name__ for kind in strange))
        raise ServingError(f"a {config.model_type!r} model keeps more than keys and values ({names})")
    return layers


def _aware(make: Callable[..., Tensor | None]) -> Callable[..., Tensor | None]:
    """A mask function of transformers that knows that rows may begin at places of their own."""

    def mask(*others: Any, **arguments: Any) -> Tensor | None:
        rows = _rows.get()
        if rows is None or rows.begin is not None:
            return make(*others, **arguments)
        return ragged(rows, *others, **arguments)

    def ragged(rows: Rows, *, mask_function: Callable[..., Tensor], device: torch.device, **arguments: Any) -> Tensor:
        row = torch.arange(arguments["batch_size"], device=device)[:, None, None, None]
        keys = torch.arange(arguments["kv_length"], device=device)[None, None, None, :]
        allowed = mask_function(row, torch.zeros_like(row), rows.positions[:, None, :, None], keys)
        allowed = allowed.expand(len(row), 1, rows.num_tokens, keys.shape[-1])
        if make is sdpa_mask:
            return allowed
        zero, least = torch.zeros((), dtype=arguments["dtype"]), torch.finfo(arguments["dtype"]).min
        return torch.where(allowed, zero.to(device), least)

    return mask


ALL_MASK_ATTENTION_FUNCTIONS.register("sdpa", _aware(sdpa_mask))
ALL_MASK_ATTENTION_FUNCTIONS.register("eager", _aware(eager_mask))
