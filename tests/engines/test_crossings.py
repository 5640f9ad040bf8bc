"""Where pictures become tokens: at who asks or at the generator, with the same answers; what crosses, and what it takes."""

from __future__ import annotations

import asyncio
from collections import Counter
from functools import partial
from pathlib import Path

import pytest

from ecogen.accounting.ledger import settle
from ecogen.config import Recipe, build_topology
from ecogen.errors import ConfigError
from ecogen.records import CrossingRecord
from ecogen.relay import assessment
from ecogen.relay.judge import train_judge
from ecogen.serving.crossing import CROSS
from ecogen.transport.base import Message
from ecogen.transport.memory import MemoryNetwork, MemoryTransport
from tests.pictures import pair_recipe, save_pair_foundation
from tests.runs import Finished, finish, run, running

NUMBER = 3


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    foundation = save_pair_foundation(tmp_path_factory.mktemp("model"))
    return pair_recipe(foundation, evaluation={"crossings": NUMBER})


def crossings(finished: Finished) -> list[CrossingRecord]:
    return [record for record in finished.records if isinstance(record, CrossingRecord)]


async def test_both_placements_answer_the_same_bit_for_bit(recipe: Recipe, tmp_path: Path) -> None:
    told = crossings(await run(recipe, tmp_path))
    assert len(told) == 2 * NUMBER * 2 * 2  # edges, pictures, tasks, ways
    answers = {(one.request_id, one.task, one.crossing): one.answer for one in told}
    assert len(answers) == len(told)
    for (request_id, task, crossing), answer in answers.items():
        assert answer == answers[request_id, task, "tokens" if crossing == "pictures" else "pictures"]
    assert len({one.answer for one in told if one.task == "draw"}) > 1, "not always the same picture"
    for one in told:
        assert min(one.generate_s, one.encode_s, one.decode_s) > 0
        assert one.transfer_s >= 0
