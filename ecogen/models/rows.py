"""Rows of many requests that run together, each at a place of its own, and masks of transformers that know these.

Masks are told through transformers' own interface, so that windows, chunks and soft caps stay the model's.

Shapes: B rows, T tokens of each.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, eager_mask, sdpa_mask


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
        self.part = slice(first, self.stop)
        self.slots = torch.arange(first, self.stop, device=positions.device)[:, None]
        self.fresh = [slot for slot, start in enumerate(starts, first) if not start]

    def apart(self) -> list[Rows]:
        """Each row by itself."""
        return [Rows(slot, positions[None]) for slot, positions in enumerate(self.positions, self.first)]


@contextmanager
def masked(rows: Rows) -> Iterator[None]:
    """Within it, masks are those rows'."""
    token = _rows.set(rows)
    try:
        yield
    finally:
        _rows.reset(token)


_rows: ContextVar[Rows | None] = ContextVar("rows that run", default=None)


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
