"""How much one key may ask for: the sizes of a request, how many at once and how many a minute."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from ecogen.serving.openai.keys import Caller
from ecogen.serving.openai.refusals import too_many


@dataclass(frozen=True)
class Limits:
    """None is no limit.

    Attributes:
        body_bytes: of a request.
        body_s: until it is here.
        choices: of each prompt (`n`).
        prompts: of one request.
        prompt_tokens: of one prompt; what the model has room for is a limit anyway.
        pictures: in the messages of one request.
        stops: stop strings, OpenAI's four.
        stop_chars: of one of them.
        requests_at_once: of one key.
        requests_per_minute: of one key, on average; as many may come at once.
        adapters: that one tenant may bring.
        adapters_at_once: on their way, of one tenant.
        adapter_bytes: of each of them.
        write_s: how long a reader of a stream may take nothing.
    """

    body_bytes: int = 4 * 2**20
    body_s: float = 30.0
    choices: int = 8
    prompts: int = 16
    prompt_tokens: int | None = None
    pictures: int = 8
    stops: int = 4
    stop_chars: int = 256
    requests_at_once: int | None = 64
    requests_per_minute: int | None = None
    adapters: int = 16
    adapters_at_once: int = 4
    adapter_bytes: int = 256 * 2**20
    write_s: float = 20.0


class Gate:
    """Lets requests in while their key has any left.

    Args:
        clock: seconds.
    """

    def __init__(self, limits: Limits, clock: Callable[[], float] = time.monotonic) -> None:
        self._limits, self._clock = limits, clock
        self._running: Counter[bytes | None] = Counter()
        self._left: dict[bytes | None, tuple[float, float]] = {}  # requests, as of when

    @contextmanager
    def admitted(self, caller: Caller) -> Iterator[None]:
        """While a request runs.

        Raises:
            Refusal: 429, if its key has too many.
        """
        at_once = self._limits.requests_at_once
        if at_once is not None and self._running[caller.key_id] >= at_once:
            raise too_many(f"This key has {at_once} requests running, as many as it may; wait for one to end")
        self._count(caller)
        self._running[caller.key_id] += 1
        try:
            yield
        finally:
            self._running[caller.key_id] -= 1

    def _count(self, caller: Caller) -> None:
        """Take one of the requests that a key has left; they come back evenly."""
        per_minute = self._limits.requests_per_minute
        if per_minute is None:
            return
        now_s = self._clock()
        left, then_s = self._left.get(caller.key_id, (float(per_minute), now_s))
        left = min(float(per_minute), left + (now_s - then_s) * per_minute / 60)
        if left < 1:
            raise too_many(f"This key may ask {per_minute} times a minute; wait", (1 - left) * 60 / per_minute)
        self._left[caller.key_id] = left - 1, now_s
