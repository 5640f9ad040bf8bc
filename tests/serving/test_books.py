"""What was served is in the books: every request once, all nodes' time once, and every grouping sums to one total."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from ecogen.config import Serving
from ecogen.engines.books import begin_books, read_books
from ecogen.engines.serving import first_answer, launch_serving
from ecogen.errors import RunError
from ecogen.node.books import hand_in_books
from ecogen.records import PhaseRecord, Record, ServedRecord, Usage, read_records
from ecogen.reports.served import Cost
from ecogen.storage import read_lines
from tests.serving.federations import prompts, request, serving, tiny_recipe, whole_answer

PROMPTS = prompts(6)


def records_of(folder: Path) -> list[Record]:
    path = folder / "nodes" / "cloud" / "records.jsonl"
    return read_records(read_lines(path), str(path))


def served_in(folder: Path) -> list[ServedRecord]:
    return [record for record in records_of(folder) if isinstance(record, ServedRecord)]


async def test_requests_and_tokens_are_counted_once(model: Path, tmp_path: Path) -> None:
    recipe = tiny_recipe(model, edges=2)
    begin_books(tmp_path, recipe)
    async with launch_serving(recipe, folder=tmp_path) as gateway:
        answers = await asyncio.gather(*(whole_answer(gateway, prompt, 10) for prompt in PROMPTS))
        left = gateway.generate(request(gateway, [5, 6, 7], 30))
        await anext(left)
        await left.aclose()
    books = read_books(tmp_path)
    assert books.num_requests == len(PROMPTS) + 1
    assert books.prompt_tokens == sum(map(len, PROMPTS)) + 3
    assert 61 <= books.completion_tokens < 90  # the one that was left had one at least
    assert books.reused_tokens == sum(finish.num_reused for _, finish in answers)
    assert books.share_j >= sum(finish.bill.energy_j.mid for _, finish in answers)
    assert books.inference_s >= sum(finish.t_inference_s for _, finish in answers)


async def test_every_grouping_sums_to_one_total(model: Path, tmp_path: Path) -> None:
    recipe = tiny_recipe(model, edges=2)
    begin_books(tmp_path, recipe)
    async with launch_serving(recipe, folder=tmp_path) as gateway:
        await asyncio.gather(*(whole_answer(gateway, prompt, 10) for prompt in PROMPTS))
    books = read_books(tmp_path)
    expected = figures([books.total])
    assert min(expected) > 0
    for costs in (books.by_tier, books.by_site, books.by_node):
        assert figures(costs.values()) == pytest.approx(expected)
    assert list(books.by_tier) == ["cloud", "edge", "end"]
    assert len(books.by_node) == 1 + 2 + 2 * 3


def figures(costs: object) -> list[float]:
    """Seconds, bytes, and the bounds of joules and grams, added up."""
    rows = [
        (cost.cpu_s, cost.sent_bytes, *cost.energy_j, *cost.emissions_g) for cost in costs if isinstance(cost, Cost)
    ]  # type: ignore[attr-defined]
    return [sum(column) for column in zip(*rows, strict=True)]


async def test_windows_leave_out_no_time(model: Path, tmp_path: Path) -> None:
    """From a device's first window to its last there is no gap, and delivery is in the books too."""
    async with launch_serving(tiny_recipe(model, devices=1), folder=tmp_path) as gateway:
        for prompt in PROMPTS:
            await whole_answer(gateway, prompt, 3)
            await hand_in_books(gateway._transport, ["edge-0"])
    records, served = records_of(tmp_path), served_in(tmp_path)
    assert [record.num_requests for record in served] == [1] * len(PROMPTS) + [0]
    device = "edge-0.cluster-0.device-0"
    assert covered_s(records, device) == pytest.approx(served[-1].time_s - first_s(records, device), abs=0.5)
    delivered = [r for r in records if isinstance(r, PhaseRecord) and r.node_id == device]
    assert [record.phase for record in delivered] == ["delivery"] * 2  # as it joined, and as it loaded the model


def usages(records: list[Record], node_id: str) -> list[Usage]:
    return [usage for record in records for usage in getattr(record, "usages", ()) if usage.node_id == node_id]


def covered_s(records: list[Record], node_id: str) -> float:
    return sum(usage.wall_s for usage in usages(records, node_id))


def first_s(records: list[Record], node_id: str) -> float:
    """When the first window of a node began."""
    record = next(record for record in records if isinstance(record, PhaseRecord) and record.node_id == node_id)
    return record.time_s - record.wall_s


@pytest.mark.parametrize("what", ["a device is drained", "edge-0", "cloud"])
async def test_delivery_ends_no_window_of_serving(what: str, model: Path, tmp_path: Path) -> None:
    """Devices that load the model anew, and nodes that join again, had served before: no step of that is delivery."""
    spec = Serving(slots=2, max_tokens=64, patience_s=20)
    async with serving(tiny_recipe(model, devices=2, serving=spec), tmp_path) as (gateway, engine):
        await whole_answer(gateway, PROMPTS[0], 10)
        if what == "a device is drained":
            await gateway.drain("edge-0.cluster-0.device-0")
        else:
            before = delivered_in(tmp_path)
            await engine.kill(what)
            await engine.start_node(what)
            for _ in range(200):
                await asyncio.sleep(0.1)
                if delivered_in(tmp_path) != before:
                    break
        await whole_answer(gateway, PROMPTS[0], 10)
        await hand_in_books(gateway._transport, ["edge-0"])
    assert not [line for usage in delivered_in(tmp_path) for line in usage.traffic if line.kind == "activations"]
    (served,) = served_in(tmp_path)
    assert all(usage.phase == "serving" for usage in served.usages)
    assert len(served.usages) > len({usage.node_id for usage in served.usages})


def delivered_in(folder: Path) -> list[Usage]:
    """What nodes took to join, and to load the model."""
    phases = [record for record in records_of(folder) if isinstance(record, PhaseRecord) and record.phase == "delivery"]
    return [usage for record in phases for usage in record.usages]


async def test_the_edge_writes_when_it_is_time(model: Path, tmp_path: Path) -> None:
    """And not before anybody has asked."""
    spec = Serving(slots=2, max_tokens=64, books_s=0.2, patience_s=20)
    async with serving(tiny_recipe(model, serving=spec), tmp_path) as (gateway, _):
        await asyncio.sleep(0.6)
        assert not served_in(tmp_path)
        await whole_answer(gateway, PROMPTS[0], 5)
        for _ in range(100):
            await asyncio.sleep(0.1)
            if served_in(tmp_path):
                break
        assert [record.num_requests for record in served_in(tmp_path)] == [1]


async def test_a_lost_device_does_not_keep_the_books_open(model: Path, tmp_path: Path) -> None:
    async with serving(tiny_recipe(model), tmp_path) as (gateway, engine):
        await whole_answer(gateway, PROMPTS[0], 5)
        await engine.kill("edge-0.cluster-0.device-2")
        await hand_in_books(gateway._transport, ["edge-0"])
    (record,) = served_in(tmp_path)
    assert {"edge-0", "edge-0.cluster-0.device-0"} <= {usage.node_id for usage in record.usages}


async def test_a_request_that_moves_is_counted_once(model: Path, tmp_path: Path) -> None:
    """With its prompt, although both edges write down what they did of it."""
    recipe, prompt = tiny_recipe(model, devices=1, edges=2), list(range(5, 15))
    begin_books(tmp_path, recipe)
    async with launch_serving(recipe, folder=tmp_path) as gateway:
        tokens = gateway.generate(request(gateway, prompt, 40))
        begun = [await anext(tokens) for _ in range(3)]
        await next(edge.stream for edge in gateway._edges if edge.answers and edge.stream).close()
        rest = [one async for one in tokens]
    first, second = sorted(served_in(tmp_path), key=lambda record: record.num_requests, reverse=True)
    assert len(begun) + len(rest) == 40 + 1
    assert (first.num_requests, first.prompt_tokens) == (1, len(prompt))
    assert (second.num_requests, second.prompt_tokens, second.reused_tokens) == (0, 0, 0)
    assert second.completion_tokens > 0
    assert 40 <= read_books(tmp_path).completion_tokens < 80


async def test_what_the_gateway_asks_itself_is_no_request(model: Path, tmp_path: Path) -> None:
    """Also where the answer is one that was given before; what it took is in the total."""
    spec = Serving(slots=2, max_tokens=64, answers=4)
    recipe = tiny_recipe(model, serving=spec)
    begin_books(tmp_path, recipe)
    async with launch_serving(recipe, folder=tmp_path) as gateway:
        await first_answer(gateway)
        await first_answer(gateway)
    books = read_books(tmp_path)
    assert (books.num_requests, books.prompt_tokens, books.completion_tokens, books.share_j) == (0, 0, 0, 0)
    assert books.total.cpu_s > 0


def test_books_of_other_nodes_are_kept_apart(model: Path, tmp_path: Path) -> None:
    begin_books(tmp_path, tiny_recipe(model))
    begin_books(tmp_path, tiny_recipe(model, serving=Serving(slots=3)))
    with pytest.raises(RunError, match=r"holds a run or other nodes than these; choose another folder with --out"):
        begin_books(tmp_path, tiny_recipe(model, devices=2))
    assert read_books(tmp_path).num_requests == 0
