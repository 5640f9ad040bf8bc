"""What a device changed, in fewer bytes, and nothing of it lost: error feedback.

What rounding leaves of a change is added to the next one: p = y - x + e is sent as Q(p), and e = p - Q(p) stays
(Seide et al. 2014; Karimireddy et al. 2019, Algorithm 2, https://arxiv.org/abs/1901.09847). So all that was sent
differs from all that was changed by the last e alone, where without it errors add up.

Only attempts that the edge counted are sent for good; so e is kept by attempt. A device that lost its disk begins with
none, which costs one rounding.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from ecogen.config import WireType
from ecogen.models.tunables import Tunables
from ecogen.runtime.compression import compress_all, restore_all
from ecogen.tuning.attempt_memory import AttemptMemory


class Feedback:
    """Rounds the changes of one device.

    Args:
        path: of the file that it keeps e in.
        wire_type: what it rounds to.
    """

    def __init__(self, path: Path, wire_type: WireType) -> None:
        self._memory, self._wire_type = AttemptMemory(path), wire_type
        self._error: Tunables = {}

    def begin(self, counted: int | None) -> None:
        """Begin an attempt.

        Args:
            counted: this cluster's attempt that was counted last; None where none was.
        """
        self._error = self._memory.begin(counted) or {}

    def end(self, attempt: int, begun: Mapping[str, Tensor], answer: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What travels of the tunables that an attempt ended with; what is left of them is written down.

        Args:
            begun: the tunables that it began with.
        """
        wanted = {name: tensor - begun[name] + self._error.get(name, 0) for name, tensor in answer.items()}
        sent = compress_all(wanted, self._wire_type)
        back = restore_all(sent)
        self._memory.end(attempt, {name: change - back[name] for name, change in wanted.items()})
        return sent
