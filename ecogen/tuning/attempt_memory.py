"""What a device keeps on its disk from one attempt to the next.

What an attempt leaves counts only once the edge has counted the attempt, and each order says which was counted last. So
both are kept, what the attempt began with and what it ended with, until the next order says which it goes on with. A
device that is killed at any moment comes back with both or with the first, as its edge does.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from ecogen.models.checkpoint import load_metadata, load_tensors, save_tensors
from ecogen.models.tunables import Tunables

_KEEPS = "attempts"


class AttemptMemory:
    """Tensors by the attempt that left them.

    Args:
        path: of the file that they are in.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._begun: tuple[int, Mapping[str, Tensor]] | None = None

    @property
    def attempts(self) -> list[int]:
        """Those of which something is kept."""
        attempts: list[int] = json.loads(load_metadata(self.path)[_KEEPS]) if self.path.exists() else []
        return attempts

    def begin(self, counted: int | None) -> Tunables | None:
        """What the attempt that was counted last left; None where nothing of it is here."""
        if counted is None or counted not in self.attempts:
            self._begun = None
            return None
        prefix, tensors = f"{counted} ", load_tensors(self.path)
        left = {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
        self._begun = counted, left
        return left

    def end(self, attempt: int, left: Mapping[str, Tensor]) -> None:
        """Write down what this attempt leaves, beside what it began with."""
        kept = dict([self._begun] if self._begun else []) | {attempt: left}
        tensors = {f"{number} {name}": tensor for number, part in kept.items() for name, tensor in part.items()}
        save_tensors(self.path, tensors, {_KEEPS: json.dumps(list(kept))})
