"""One process a node: what it learns is what one process learns, and a node whose process is killed comes back."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from multiprocessing import Pipe
from pathlib import Path
from typing import Any, cast

import pytest
import torch

from ecogen.config import Recipe
from ecogen.engines import local
from ecogen.engines.federation import Federation
from ecogen.engines.local import LocalEngine, launch_local
from ecogen.errors import ConfigError, NodeLostError, RunError
from ecogen.node.process import LOG
from ecogen.records import EventRecord, Record, RoundRecord
from tests import runs
from tests.runs import Finished, duplicates, finish

RecipeOf = Callable[..., Recipe]

DEVICE = "edge-0.cluster-1.device-1"
LONG = {"rounds": 3, "local_epochs": 12, "rejoin_timeout_s": 60.0}


@asynccontextmanager
async def running(recipe: Recipe, folder: Path) -> AsyncIterator[tuple[Federation, LocalEngine]]:
    """A federation of processes, and its engine, for tests that kill some."""
    async with asyncio.timeout(150), launch_local(recipe, folder) as federation:
        engine = federation._engine
        assert isinstance(engine, LocalEngine)
        yield federation, engine


async def run(recipe: Recipe, folder: Path) -> Finished:
    async with running(recipe, folder) as (federation, _):
        return await finish(federation)


async def run_and_kill(recipe: Recipe, folder: Path, node_id: str, pause_s: float = 0.05) -> Finished:
    """Kill a node a moment after the first round of an edge, and watch to the end."""
    async with running(recipe, folder) as (federation, engine):
        first_pid = None
        async for record in federation.watch():
            if first_pid is None and isinstance(record, RoundRecord) and record.node_id.startswith("edge"):
                await asyncio.sleep(pause_s)
                first_pid = engine.pid(node_id)
                os.kill(first_pid, signal.SIGKILL)
        assert engine.pid(node_id) != first_pid
        return Finished(federation.records, await federation.tunables())


def events(records: Sequence[Record]) -> list[tuple[str, str]]:
    return [(record.event, record.node_id) for record in records if isinstance(record, EventRecord)]


def assert_same(left: Finished, right: Finished, tolerance: float) -> None:
    assert left.tunables.keys() == right.tunables.keys()
    for name, tensor in left.tunables.items():
        torch.testing.assert_close(tensor, right.tunables[name], rtol=0, atol=tolerance)
    for node_id in ("cloud", "edge-0"):
        assert [r.accuracy for r in left.rounds(node_id)] == [r.accuracy for r in right.rounds(node_id)]


async def test_processes_learn_the_bits_that_one_process_learns(recipe_of: RecipeOf, tmp_path: Path) -> None:
    """Random numbers are keyed and each node computes on one thread, so not even the last bit may differ."""
    recipe = recipe_of(topology={"edges": 2, "devices_per_cluster": 3}, tuning={"augmentation": 0.3})
    together = await runs.run(recipe, tmp_path / "inproc")
    apart = await run(recipe, tmp_path / "local")
    assert_same(apart, together, tolerance=0)
    assert [r.loss for r in apart.rounds("edge-1")] == [r.loss for r in together.rounds("edge-1")]


async def test_a_killed_device_is_missed_for_a_round_and_comes_back(recipe_of: RecipeOf, tmp_path: Path) -> None:
    recipe = recipe_of(tuning=LONG | {"rounds": 15})
    finished = await run_and_kill(recipe, tmp_path, DEVICE)
    seen = events(finished.records)
    steps = [("cluster_failed", "edge-0.cluster-1"), ("rejoined", DEVICE), ("cluster_formed", "edge-0.cluster-1")]
    assert [event for event in seen if event in steps] == steps
    assert ("lost", DEVICE) in seen
    rounds = finished.rounds("edge-0")
    assert [record.round_index for record in rounds] == list(range(15))
    assert not list(duplicates(finished.records))
    with_all = [not record.missing for record in rounds]
    assert with_all[0]
    assert not all(with_all)
    assert with_all[-1]
    for record in rounds:
        assert record.num_examples == 24 * len(record.members)
        assert sorted((*record.members, *record.missing)) == ["edge-0.cluster-0", "edge-0.cluster-1"]
    failed = next(r for r in finished.records if isinstance(r, EventRecord) and r.event == "cluster_failed")
    assert next(r.round_index for r in rounds if r.missing) == failed.round_index


async def test_the_only_cluster_is_waited_for_and_its_round_done_again(recipe_of: RecipeOf, tmp_path: Path) -> None:
    recipe = recipe_of(topology={"clusters_per_edge": 1}, tuning=LONG)
    killed = await run_and_kill(recipe, tmp_path / "killed", "edge-0.cluster-0.device-0")
    undisturbed = await runs.run(recipe, tmp_path / "undisturbed")
    assert ("cluster_failed", "edge-0.cluster-0") in events(killed.records)
    assert all(not record.missing for record in killed.rounds("edge-0"))
    assert_same(killed, undisturbed, tolerance=0)


@pytest.mark.parametrize("node_id", ["edge-0", "cloud"])
async def test_a_killed_edge_or_cloud_goes_on_to_the_same_end(
    recipe_of: RecipeOf, tmp_path: Path, node_id: str
) -> None:
    recipe = recipe_of(tuning=LONG)
    killed = await run_and_kill(recipe, tmp_path / "killed", node_id)
    undisturbed = await runs.run(recipe, tmp_path / "undisturbed")
    assert_same(killed, undisturbed, tolerance=0)
    assert not list(duplicates(killed.records))
    assert events(killed.records)[-1] == ("finished", "cloud")
    assert (("resumed", "edge-0") in events(killed.records)) is (node_id == "edge-0")


async def test_a_node_that_keeps_dying_is_given_up(
    recipe_of: RecipeOf, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(local, "_PAUSE_S", 0.01)
    recipe = recipe_of(tuning={"rounds": 1000, "local_epochs": 5})
    async with running(recipe, tmp_path) as (federation, engine):

        async def kill_again_and_again() -> None:
            pids: set[int] = set()
            while True:
                if (pid := engine._children[DEVICE].process.pid) and pid not in pids:
                    pids.add(pid)
                    os.kill(pid, signal.SIGKILL)
                await asyncio.sleep(0.02)

        killer = asyncio.create_task(kill_again_and_again())
        with pytest.raises(RunError, match=rf"{DEVICE} was killed by signal 9, for the 5th time.*{LOG}.*--resume"):
            await finish(federation)
        killer.cancel()
    assert f"{DEVICE} is given up: {DEVICE} was killed" in caplog.text


async def test_a_nodes_own_error_reaches_the_launcher_as_that_error(recipe_of: RecipeOf, tmp_path: Path) -> None:
    (tmp_path / "nodes" / "edge-0").mkdir(parents=True)
    (tmp_path / "nodes" / "edge-0" / "records.jsonl").write_text('{"type": "nonsense"}\n')
    with pytest.raises(RunError, match=r"records.jsonl:1: not a record .*restore the file or run again"):
        await run(recipe_of(), tmp_path)


async def test_an_error_after_the_start_reaches_the_launcher_too(recipe_of: RecipeOf, tmp_path: Path) -> None:
    recipe = recipe_of(compute={"nodes": {"cloud": {"device": "cuda:63"}}})
    with pytest.raises(ConfigError, match="'cuda:63' is not on this machine"):
        await run(recipe, tmp_path)


async def test_what_nodes_print_is_in_their_logs(
    recipe_of: RecipeOf, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    async with running(recipe_of(), tmp_path) as (_, engine):
        pids = [engine.pid(node_id) for node_id in engine._children]
    assert all(not alive(pid) for pid in pids)
    assert capfd.readouterr() == ("", "")
    assert (tmp_path / "nodes" / "cloud" / LOG).exists()


async def test_a_lost_cloud_is_not_waited_for_forever(recipe_of: RecipeOf, tmp_path: Path) -> None:
    recipe = recipe_of(tuning={"rounds": 1000, "rejoin_timeout_s": 0.5})
    async with running(recipe, tmp_path) as (federation, engine):
        engine._restart = False
        os.kill(engine.pid("cloud"), signal.SIGKILL)
        with pytest.raises(NodeLostError, match="cloud"):
            await finish(federation)


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


@pytest.mark.parametrize("num_turns", range(4))
async def test_who_keeps_a_node_ends_even_as_the_node_says_that_it_serves(num_turns: int) -> None:
    """Or an engine that is stopped while a node comes back would wait for its keeper for ever."""
    ours, theirs = Pipe()
    child = local._Child(cast(Any, None), ours, 0.0)
    reporting = asyncio.create_task(local._report(child, 30))
    await asyncio.sleep(0.01)
    theirs.send({"address": "here"})
    while not ours.poll():
        pass
    for _ in range(num_turns):
        await asyncio.sleep(0)
    if reporting.cancel():
        with pytest.raises(asyncio.CancelledError):
            await reporting
    else:
        assert await reporting == {"address": "here"}
