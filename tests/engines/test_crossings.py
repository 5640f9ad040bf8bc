"""Edges ask the cloud's generator with modules at either end: the same answers, and a report of what that took."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest

from ecogen.accounting.ledger import settle
from ecogen.config import Recipe, build_topology, load
from ecogen.errors import CheckpointError, ConfigError, DataError, EcoGenError, ProtocolError
from ecogen.records import CrossingRecord, PhaseRecord
from ecogen.relay import assessment
from ecogen.relay.judge import train_judge
from ecogen.serving.crossing import CROSS, Front, Order, Told
from ecogen.transport.base import Message, Peer
from ecogen.transport.memory import MemoryTransport
from ecogen.tuning.captions import DIGITS, digit_caption
from tests.pictures import pair_recipe, save_pair_foundation
from tests.runs import Finished, finish, run, running

NUMBER = 12


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    foundation = save_pair_foundation(tmp_path_factory.mktemp("model"))
    return pair_recipe(foundation, evaluation={"crossings": NUMBER})


def crossings(finished: Finished) -> list[CrossingRecord]:
    return [record for record in finished.records if isinstance(record, CrossingRecord)]


async def test_both_placements_answer_the_same_and_are_billed(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    orders = list[Order]()
    call = MemoryTransport.call

    async def seen(self: MemoryTransport, node_id: str, message: Message, *, timeout_s: float | None = None) -> Message:
        if message.method == CROSS:
            orders.append(message.read(Order))
        return await call(self, node_id, message, timeout_s=timeout_s)

    monkeypatch.setattr(MemoryTransport, "call", seen)
    done = await run(recipe, tmp_path)
    told = crossings(done)
    assert len(told) == 2 * NUMBER * 2 * 2  # edges, pictures, tasks, ways
    answers = {(one.request_id, one.task, one.crossing): one.answer for one in told}
    assert len(answers) == len(told)
    for (request_id, task, crossing), answer in answers.items():
        assert answer == answers[request_id, task, "tokens" if crossing == "pictures" else "pictures"]
    assert len({one.answer for one in told if one.task == "draw"}) > 1, "not always the same picture"
    assert all(min(one.generate_s, one.encode_s, one.decode_s) > 0 for one in told)
    ledger = settle(done.records, build_topology(recipe.topology))
    [samples] = [line for line in ledger.traffic() if line.kind == "samples"]
    carried = sum(one.received_bytes if one.task == "draw" else one.sent_bytes for one in told)
    assert (samples.link_class, samples.sent_bytes, samples.messages) == ("cloud_edge", carried, len(told))
    closing = [one for one in done.records if isinstance(one, PhaseRecord) and one.phase == "serving"]
    assert sum(usage.flops for one in closing for usage in one.usages if usage.node_id == "cloud") > 0
    captions = [order.told.text for order in orders if order.told.text is not None]
    assert set(captions) == {digit_caption(digit) for digit in range(len(DIGITS))}, "of all digits, not of the edge's"


@pytest.mark.parametrize(
    "error", [ProtocolError("nonsense"), CheckpointError("other modules"), DataError("no picture")]
)
async def test_a_measurement_that_fails_does_not_end_the_run(
    error: EcoGenError, recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ask, asked = Front.ask, list[str]()

    async def fails(self: Front, request_id: str, *order: Any) -> Any:
        asked.append(request_id)
        if request_id.endswith("-3"):
            raise error
        return await ask(self, request_id, *order)

    monkeypatch.setattr(Front, "ask", fails)
    done = await run(recipe, tmp_path)
    assert {event.node_id for event in done.events("finished")} == {"cloud", "edge-0", "edge-1"}
    assert len(crossings(done)) == 2 * 3 * 2 * 2, "edges, pictures before the failure, tasks, ways"
    assert not any(request_id.endswith("-4") for request_id in asked)


async def test_the_report_and_its_json_show_both(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(assessment, "train_judge", partial(train_judge, steps=5))
    async with running(recipe, tmp_path) as (federation, _):
        told = crossings(await finish(federation))
        found = (await federation.save(tmp_path))["crossings"]
    assert found is not None
    assert (found["num_compared"], found["num_same"]) == (2 * NUMBER * 2, 2 * NUMBER * 2)
    assert [(one["task"], one["modules"], one["crossing"]) for one in found["placements"]] == [
        (task, modules, crossing)
        for task in ("draw", "describe")
        for modules, crossing in (("edge", "tokens"), ("cloud", "pictures"))
    ]
    for one in found["placements"]:
        own = [record for record in told if (record.task, record.crossing) == (one["task"], one["crossing"])]
        assert one["num_requests"] == len(own)
        assert min(record.sent_bytes for record in own) <= one["sent_bytes"] <= max(record.sent_bytes for record in own)
        assert one["total_s"] > one["link_s"] > 0.04, "the recipe's link has a round trip of 40 ms"
    page = (tmp_path / "report.html").read_text()
    assert page.count("Where pictures become tokens") == 1
    assert "Of 48 pictures and captions, 48 came out the same both ways" in page
    assert "A request by where the modules are" in page


async def test_a_run_without_crossings_says_nothing_of_them(recipe: Recipe, tmp_path: Path) -> None:
    without = pair_recipe(Path(recipe.model.source))
    async with running(without, tmp_path) as (federation, engine):
        assert crossings(await finish(federation)) == []
        order = Message.of(CROSS, Order("draw", Told(text="a")))
        for node_id, tier, said in (("edge-0", "edge", r"set evaluation\.crossings"), ("edge-0.x", "end", "may not")):
            with pytest.raises(EcoGenError, match=said):
                await engine.network.join(Peer(node_id, tier)).call("cloud", order)


def test_only_generators_of_pictures_are_asked() -> None:
    with pytest.raises(ConfigError, match=r"evaluation\.crossings: only a text-image generator draws"):
        load("text", ["evaluation.crossings=2"])
    with pytest.raises(ConfigError, match=r"evaluation\.crossings: only a text-image generator draws"):
        load("digits", ["evaluation.crossings=2"])
