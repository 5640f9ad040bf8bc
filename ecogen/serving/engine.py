"""Answers many requests at once: the scheduler's steps go through a chain, and its last stage chooses what comes next.

One task for each group of slots; while one group's step is at a later stage, the next one's is at an earlier. A chain
may be taken away and another put in its place: what was being answered goes on where it was.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections.abc import AsyncGenerator, Awaitable, Callable, Collection, Sequence
from contextlib import suppress
from dataclasses import replace

from ecogen.errors import NodeLostError, OverloadedError, ServingError, StepError
from ecogen.serving.sampling import Chosen, Sampling
from ecogen.serving.scheduler import Scheduler, Step
from ecogen.serving.steps import Order, Start

logger = logging.getLogger(__name__)

RunStep = Callable[[Order], Awaitable[Sequence[Chosen | str]]]
"""Sends a step through all stages; gives the token of each row that has one, or why not; on failure of every row."""


_Given = Chosen | str | StepError
"""What a step gave for one request: its token, why it has none, or that the whole step failed."""


class _Answer:
    """One request at work."""

    def __init__(
        self, sampling: Sampling, max_new: int, ends: Collection[int], adapter: str, given: Sequence[int]
    ) -> None:
        # Of its own from the beginning: whichever stage goes on with it draws as the one before would have.
        self.sampling = sampling if sampling.seed is not None else replace(sampling, seed=secrets.randbits(63))
        self.max_new, self.ends, self.adapter, self.given = max_new, ends, adapter, list(given)
        self.num_reused = 0
        self.news: asyncio.Queue[Chosen | Exception | None] = asyncio.Queue()

    def take(self, chosen: _Given) -> tuple[int, bool]:
        """The next token, and whether it is the last; without one this answer ends, and no other."""
        if not isinstance(chosen, Chosen):
            return _NOBODY_WAITS
        self.given.append(chosen.token)
        return chosen.token, len(self.given) >= self.max_new or chosen.token in self.ends

    def tell(self, chosen: _Given, is_last: bool) -> None:
        """Let the reader know what was taken."""
        self.news.put_nowait(ServingError(chosen) if isinstance(chosen, str) else chosen)
        if is_last:
            self.news.put_nowait(None)


_NOBODY_WAITS = (0, True)
"""A token of no meaning, and that it is the last."""


class Engine:
    """Continuous batching over a chain, once `attach` gives it one.

    Args:
        slots_per_group: requests at once in each group; there are as many groups as the chain has stages.
        max_tokens: the longest request, prompt and answer.
        max_waiting: requests that may wait for a slot.
        chunk: tokens of a prompt that go through at once.
        shelf, keeps_parts: as `Scheduler` has them.
    """

    def __init__(
        self,
        *,
        slots_per_group: int,
        max_tokens: int,
        max_waiting: int = 1024,
        chunk: int = 256,
        shelf: int = 0,
        keeps_parts: bool = True,
    ) -> None:
        self.max_tokens, self._max_waiting = max_tokens, max_waiting
        self._scheduler = Scheduler(0, slots_per_group, chunk, shelf=shelf, keeps_parts=keeps_parts)
        self._answers: dict[str, _Answer] = {}
        self._started: set[str] = set()  # those whose settings the chain's last stage has
        self._ended: list[str] = []  # and of these, those that it need not keep any longer
        self._news: list[asyncio.Event] = []
        self._loops: list[asyncio.Task[None]] = []

    def attach(self, run_step: RunStep, num_groups: int) -> None:
        """Go on with a chain that has nothing cached."""
        self._scheduler.restart(num_groups)
        self._started.clear()
        self._ended.clear()
        self._news = [asyncio.Event() for _ in range(num_groups)]
        self._loops = [asyncio.create_task(self._serve(group, run_step)) for group in range(num_groups)]

    async def detach(self) -> None:
        """Leave the chain; requests wait for the next one."""
        loops, self._loops = self._loops, []
        for loop in loops:
            loop.cancel()
        for loop in loops:
            with suppress(asyncio.CancelledError):
                await loop

    def fail(self, problem: Exception, adapter: str | None = None) -> None:
        """Tell all requests that they end here, or all of one adapter."""
        for answer in self._answers.values():
            if adapter in (None, answer.adapter):
                answer.news.put_nowait(problem)

    def num_reused(self, request_id: str) -> int:
        """How many tokens of a prompt need not be computed, since one before it began with them."""
        answer = self._answers.get(request_id)
        return answer.num_reused if answer else 0

    @property
    def num_waiting(self) -> int:
        """Those without a slot."""
        return self._scheduler.num_waiting

    @property
    def num_requests(self) -> int:
        """Those that run or wait."""
        return len(self._answers)

    async def generate(
        self,
        request_id: str,
        prompt: Sequence[int],
        sampling: Sampling,
        *,
        max_new: int,
        ends: Collection[int] = (),
        adapter: str = "",
        given: Sequence[int] = (),
    ) -> AsyncGenerator[Chosen]:
        """The answer's tokens as they come, the ending one among them. Leaving early frees the slot.

        Args:
            max_new: tokens of the answer at most, those that were given before among them.
            ends: tokens after which it is over.
            adapter: which of those that the stages hold; empty for none.
            given: the answer's first tokens, where another engine has begun it.

        Raises:
            ServingError: if the request is empty or longer than there is room for, or is broken off.
            StepError: if a step that it was part of failed.
            OverloadedError: if as many wait as may.
        """
        self._check(prompt, max_new)
        if given and (len(given) >= max_new or given[-1] in ends):
            return  # the other engine had come to the end
        answer = self._answers[request_id] = _Answer(sampling, max_new, ends, adapter, given)
        self._scheduler.submit(request_id, [*prompt, *given], adapter)
        self._wake()
        try:
            while (chosen := await answer.news.get()) is not None:
                if isinstance(chosen, Exception):
                    raise chosen
                yield chosen
        finally:
            del self._answers[request_id]
            self._scheduler.cancel(request_id)
            self._ended.append(request_id)

    def _check(self, prompt: Sequence[int], max_new: int) -> None:
        if not prompt or max_new < 1 or len(prompt) + max_new > self.max_tokens:
            raise ServingError(
                f"a prompt of {len(prompt)} tokens and an answer of {max_new} do not fit 1 to {self.max_tokens} tokens"
            )
        if self._scheduler.num_waiting >= self._max_waiting:
            raise OverloadedError(f"{self._max_waiting} requests wait already; try again later")

    def _wake(self) -> None:
        for event in self._news:
            event.set()

    async def _serve(self, group: int, run_step: RunStep) -> None:
        """One group's steps, one after the other, for as long as the chain is there."""
        news = self._news[group]
        while True:
            step = self._scheduler.begin(group)
            if step is None:
                await news.wait()
                news.clear()
                continue
            try:
                chosen = await run_step(self._order(step))
            except NodeLostError:
                return  # whoever attached the chain learns it too
            except Exception:
                logger.exception("a step failed")
                self._end(step, [StepError("a step through the model failed; the log says why")] * len(step.requests))
            else:
                self._end(step, chosen)
            if self._scheduler.num_waiting:
                self._wake()  # the emptiest group may be another one now

    def _end(self, step: Step, chosen: Sequence[_Given]) -> None:
        """Hand out what a step gave."""
        given = list(zip(step.requests, chosen, strict=False))  # the rows that have no token come last
        taken = [self._take(name, one) for name, one in given]
        finished = [name for (name, _), (_, is_last) in zip(given, taken, strict=True) if is_last]
        failed = [name for name, one in given if not isinstance(one, Chosen)]
        self._scheduler.end(step.group, [token for token, _ in taken], finished, failed)

    def _take(self, request_id: str, chosen: _Given) -> tuple[int, bool]:
        answer = self._answers.get(request_id)
        if answer is None:
            return _NOBODY_WAITS
        token, is_last = answer.take(chosen)
        # Later, so that the stages have their next step before readers have this token.
        asyncio.get_running_loop().call_soon(answer.tell, chosen, is_last)
        return token, is_last

    def _order(self, step: Step) -> Order:
        answers = {name: self._answers[name] for name in step.requests if name in self._answers}
        starts = {}
        for name, answer in answers.items():
            answer.num_reused = self._scheduler.num_reused(name)
        for name in step.requests[: step.gives]:
            if name in answers and name not in self._started:
                starts[name] = Start(answers[name].sampling, tuple(answers[name].given))
        self._started |= starts.keys()
        adapters = tuple(answers[name].adapter if name in answers else "" for name in step.requests)
        ended = tuple(name for name in self._ended if name in self._started)
        self._started.difference_update(ended)
        self._ended.clear()
        return Order(step, adapters, starts, ended)
