"""Answers many requests at once: the scheduler's steps go through a chain, and samplers choose what comes next.

One task for each group of slots; while one group's step is at a later stage, the next one's is at an earlier.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Sequence
from contextlib import suppress
from itertools import count

from torch import Tensor

from ecogen.errors import ServingError
from ecogen.serving.sampling import Chosen, Constrain, Sampler, Sampling
from ecogen.serving.scheduler import Scheduler, Step

RunStep = Callable[[Step], Awaitable[Tensor]]
"""Sends a step through all stages; returns logits [B, V]."""


_NOBODY_WAITS = (0, True)
"""A token of no meaning, and that it is the last."""


class _Answer:
    """One request at work."""

    def __init__(self, choose: Sampler, max_new: int, ends: Collection[int]) -> None:
        self.choose = choose
        self.left, self.ends = max_new, ends
        self.chosen: asyncio.Queue[Chosen | Exception | None] = asyncio.Queue()

    def take(self, logits: Tensor) -> tuple[int, bool]:
        """The next token, and whether it is the last; one that cannot be chosen ends this answer only."""
        try:
            chosen = self.choose(logits)
        except Exception as problem:
            self.chosen.put_nowait(ServingError(f"no token can be chosen: {problem}; are the model's weights sound?"))
            return _NOBODY_WAITS
        self.left -= 1
        self.chosen.put_nowait(chosen)
        is_last = not self.left or chosen.token in self.ends
        if is_last:
            self.chosen.put_nowait(None)
        return chosen.token, is_last


class Engine:
    """Continuous batching over a chain.

    Args:
        run_step: the chain.
        num_groups: as many as it has stages.
        slots_per_group: requests at once in each.
        max_tokens: the longest request, prompt and answer.
        chunk: tokens of a prompt that go through at once.
        constrain: for requests with a grammar.
    """

    def __init__(
        self,
        run_step: RunStep,
        *,
        num_groups: int,
        slots_per_group: int,
        max_tokens: int,
        chunk: int = 256,
        constrain: Constrain | None = None,
    ) -> None:
        self._run_step, self._max_tokens, self._constrain = run_step, max_tokens, constrain
        self._scheduler = Scheduler(num_groups, slots_per_group, chunk)
        self._answers: dict[str, _Answer] = {}
        self._numbers = count()
        self._news = [asyncio.Event() for _ in range(num_groups)]
        self._loops: list[asyncio.Task[None]] = []

    async def __aenter__(self) -> Engine:
        self._loops = [asyncio.create_task(self._serve(group)) for group in range(len(self._news))]
        return self

    async def __aexit__(self, *_: object) -> None:
        for loop in self._loops:
            loop.cancel()
        for loop in self._loops:
            with suppress(asyncio.CancelledError):
                await loop

    async def generate(
        self, prompt: Sequence[int], sampling: Sampling, *, max_new: int, ends: Collection[int] = ()
    ) -> AsyncIterator[Chosen]:
        """The answer's tokens as they come, the ending one among them. Leaving early frees the slot.

        Args:
            max_new: tokens of the answer at most.
            ends: tokens after which it is over.

        Raises:
            ServingError: if the request is empty or longer than there is room for.
        """
        if not prompt or max_new < 1 or len(prompt) + max_new > self._max_tokens:
            raise ServingError(
                f"a prompt of {len(prompt)} tokens and an answer of {max_new} do not fit 1 to {self._max_tokens} tokens"
            )
        request_id = str(next(self._numbers))
        answer = self._answers[request_id] = _Answer(Sampler(sampling, self._constrain), max_new, ends)
        self._scheduler.submit(request_id, prompt)
        self._wake()
        try:
            while (chosen := await answer.chosen.get()) is not None:
                if isinstance(chosen, Exception):
                    raise chosen
                yield chosen
        finally:
            del self._answers[request_id]
            self._scheduler.cancel(request_id)

    def _wake(self) -> None:
        for event in self._news:
            event.set()

    async def _serve(self, group: int) -> None:
        """One group's steps, one after the other, for ever."""
        news = self._news[group]
        while True:
            step = self._scheduler.begin(group)
            if step is None:
                await news.wait()
                news.clear()
                continue
            try:
                logits = await self._run_step(step)
            except Exception as problem:
                self._fail(step, problem)
                continue
            self._give(step, logits)

    def _give(self, step: Step, logits: Tensor) -> None:
        tokens, finished = [], []
        for row, request_id in enumerate(step.requests if step.gives else ()):
            answer = self._answers.get(request_id)
            token, is_last = answer.take(logits[row]) if answer else _NOBODY_WAITS
            tokens.append(token)
            if is_last:
                finished.append(request_id)
        self._scheduler.end(step.group, tokens, finished)
        self._wake()

    def _fail(self, step: Step, problem: Exception) -> None:
        """Those whose step failed are told."""
        for request_id in step.requests:
            if answer := self._answers.get(request_id):
                answer.chosen.put_nowait(problem)
        self._scheduler.end(step.group, [0] * len(step.requests), step.requests)
        self._wake()
