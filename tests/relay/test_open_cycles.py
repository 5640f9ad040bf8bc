"""Offers and verdicts of open cycles: who is waited for, and who is not."""

from __future__ import annotations

import asyncio

import pytest
import torch

from ecogen.records import EventRecord
from ecogen.relay.open_cycles import OpenCycles
from ecogen.relay.samples import Samples
from ecogen.relay.teacher import Lesson
from ecogen.runtime.membership import Members

NOTHING = Lesson(Samples(torch.empty(0, 4, dtype=torch.long), [], {}), 0)
VERDICT = torch.zeros(0)


async def cycles(patience_s: float = 30, here: str = "ab") -> OpenCycles:
    events: list[EventRecord] = []
    members = Members("ab", events.append)
    for name in here:
        await members.join(name, f"memory:{name}")
        await members.ready(name)
    return OpenCycles(members, patience_s)


async def test_offers_and_verdicts_are_those_of_all() -> None:
    opened = await cycles()
    first = asyncio.create_task(opened.offer(0, "a", NOTHING))
    await asyncio.sleep(0.01)
    assert not first.done()
    assert opened.offers(0) is None
    assert set(await opened.offer(0, "b", NOTHING)) == set(await first) == {"a", "b"}
    await opened.judge(0, "a", VERDICT)
    verdicts = asyncio.create_task(opened.verdicts(0))
    await asyncio.sleep(0.01)
    assert not verdicts.done()
    await opened.judge(0, "b", VERDICT)
    assert set(await verdicts) == {"a", "b"}
    opened.close(0)
    assert opened.offers(0) is None


@pytest.mark.parametrize("has_offered", [False, True])
async def test_who_has_gone_on_to_the_next_cycle_is_not_waited_for(has_offered: bool) -> None:
    """Or two edges would wait for each other: one in its verdict, the other in its next offer."""
    opened = await cycles()
    if has_offered:
        await asyncio.gather(opened.offer(0, "a", NOTHING), opened.offer(0, "b", NOTHING))
    ahead = asyncio.create_task(opened.offer(1, "a", NOTHING))
    async with asyncio.timeout(5):
        await opened.offer(0, "b", NOTHING)
        await opened.judge(0, "b", VERDICT)
        assert set(await opened.verdicts(0)) == {"b"}
        opened.close(0)
        assert not ahead.done()
        assert set(await opened.offer(1, "b", NOTHING)) == set(await ahead) == {"a", "b"}


async def test_who_is_lost_is_waited_for_once() -> None:
    opened = await cycles(patience_s=0.5, here="a")
    began_s = asyncio.get_running_loop().time()
    assert set(await opened.offer(0, "a", NOTHING)) == {"a"}
    await opened.judge(0, "a", VERDICT)
    assert set(await opened.verdicts(0)) == {"a"}
    assert 0.5 <= asyncio.get_running_loop().time() - began_s < 1.0


async def test_verdicts_can_be_asked_for_again_after_a_failure() -> None:
    opened = await cycles()
    await asyncio.gather(*(opened.offer(0, name, NOTHING) for name in "ab"))
    for _ in range(2):
        for name in "ab":
            await opened.judge(0, name, VERDICT)
        async with asyncio.timeout(5):
            assert set(await opened.verdicts(0)) == {"a", "b"}
