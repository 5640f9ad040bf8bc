"""Who answers a request: whoever answers least, unless another has begun an answer to what begins alike."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable, Mapping
from typing import Generic, TypeVar

from ecogen.serving.slots import WORTH

Who = TypeVar("Who", bound=Hashable)

SLACK = 2
"""So many more requests are worth a prefix that need not be computed again."""

_REMEMBERED = 4096
_LONGEST = 32 * WORTH


class Balancer(Generic[Who]):
    """Remembers who was given what, by the first tokens of prompts in steps of `WORTH`."""

    def __init__(self) -> None:
        self._given: OrderedDict[int, Who] = OrderedDict()

    def choose(self, loads: Mapping[Who, int], prompt: tuple[int, ...], adapter: str = "") -> Who:
        """One of those that have so many requests each.

        Args:
            loads: at least one; of equals the first.
            adapter: what makes something else of the same tokens.
        """
        keys = [hash((adapter, prompt[:stop])) for stop in range(WORTH, min(len(prompt), _LONGEST) + 1, WORTH)]
        least = min(loads, key=lambda who: loads[who])
        known = next((self._given[key] for key in reversed(keys) if self._given.get(key) in loads), least)
        chosen = known if loads[known] <= loads[least] + SLACK else least
        for key in keys:
            self._given[key] = chosen
            self._given.move_to_end(key)
        while len(self._given) > _REMEMBERED:
            self._given.popitem(last=False)
        return chosen
