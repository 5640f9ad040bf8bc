"""Which layers of a block adapters are for: found in the block by name or by part, whatever the family calls them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from torch import nn

_PARTS = ("attention", "mlp")


def target_paths(block: nn.Module, targets: Sequence[str]) -> list[str]:
    """The paths within a block of the linear layers that are asked for.

    Args:
        targets: names of linear layers, as `q_proj`; or a part of the block, of which all linear layers are meant:
            "attention" is what has such a name, "mlp" the rest.
    """
    return [path for path in linear_paths(block) if _part_of(path) in targets or path.rpartition(".")[2] in targets]


def linear_paths(block: nn.Module) -> Iterator[str]:
    """The paths within a block of all its linear layers."""
    yield from (path for path, module in block.named_modules() if isinstance(module, nn.Linear))


def _part_of(path: str) -> str:
    """The part of the block that a layer is in."""
    first = path.partition(".")[0]
    return _PARTS[0] if "attn" in first or "attention" in first else _PARTS[1]
