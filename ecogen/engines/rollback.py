"""Versions that the relay's lessons led to in a run folder, and going back to one: for who uses it, and who resumes it.

A node's version is the state of its disk, from which a resumed run goes on, and the saved model that is served. What a
rollback replaces is a version itself, or becomes one first. One that was cut off is finished by the same command.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from torch import Tensor

from ecogen import config as recipes
from ecogen.engines.run_folder import NODES, RUNNING, is_running, load_recipe, locked, resume_command
from ecogen.engines.saving import RECORDS, judge_again
from ecogen.errors import CheckpointError, RunError
from ecogen.models.adapters import TUNABLES, replace_text, tuned_folder
from ecogen.models.tunables import Tunables
from ecogen.records import EventRecord, Record, RelayRecord, Taught, read_records, to_line
from ecogen.relay import versions
from ecogen.relay.cloud_state import RelayState
from ecogen.relay.versions import Version, What
from ecogen.storage import append_line, read_lines
from ecogen.tuning.edge_state import EdgeState


@dataclass(frozen=True)
class Listed:
    """A version as people look for it.

    Attributes:
        what, cycle, round_index: as in `Version`.
        time_s: when the lesson was accepted that led to it; None where none did.
        scores: of that lesson.
        in_use: whether the node has it, or has tuned on from it.
        is_tuned_on: the latter.
    """

    node_id: str
    version: int
    what: What
    cycle: int | None
    round_index: int | None
    time_s: float | None
    scores: Sequence[Taught]
    in_use: bool
    is_tuned_on: bool


@dataclass(frozen=True)
class RolledBack:
    """What a rollback did.

    Attributes:
        before: the version that was in use.
        set_aside: the version that was made of what was in use, where it was none.
        is_saved: whether the run's saved model is another now, too; an unfinished run has none.
    """

    node_id: str
    before: int
    version: int
    set_aside: int | None
    is_saved: bool


def list_versions(folder: Path) -> list[Listed]:
    """All versions of a run, node by node.

    Raises:
        RunError: if the folder holds no run with a relay, or not its nodes' disks.
        CheckpointError: if a version is corrupt.
    """
    recipe, records = _checked(folder), _records(folder)
    return [listed for node_id in _node_ids(recipe) for listed in _listed(_Node(folder, node_id), records)]


def roll_back(folder: Path, node_id: str, to: int) -> RolledBack:
    """Have a node go back to one of its versions.

    Raises:
        RunError: if the folder holds no run with a relay, or one that is going on; or there is no such version.
        CheckpointError: if the version is corrupt.
    """
    recipe = _checked(folder)
    if is_running(folder):
        raise _busy(folder)
    with locked(folder):
        if node_id not in _node_ids(recipe):
            raise RunError(f"{folder} has no versions of {node_id!r}; name one of {', '.join(_node_ids(recipe))}")
        node = _Node(folder, node_id)
        found = node.kept
        if to not in found:
            there = f"it has {', '.join(map(str, found))}" if found else "it has accepted no lesson yet"
            raise RunError(f"{node_id} of {folder} has no version {to}; {there} (`ecogen versions {folder}`)")
        return _carry_out(folder, recipe, node, found[to])


class _Node:
    """The disk of a cloud or an edge, of which the lessons are of interest."""

    def __init__(self, folder: Path, node_id: str) -> None:
        own = folder / NODES / node_id
        self.node_id, self.versions, self.is_cloud = node_id, own / versions.FOLDER, node_id == "cloud"
        self.path = (self.versions if self.is_cloud else own) / "state.safetensors"
        self.state: RelayState | EdgeState | None = None
        if self.path.exists():
            self.state = RelayState.load(self.path) if self.is_cloud else EdgeState.load(self.path)

    @property
    def version(self) -> int:
        return self.state.version if self.state else 0

    @property
    def kept(self) -> dict[int, Version]:
        """Its versions; not those of a lesson that was cut off, which is taken again."""
        latest = self.state.latest if self.state else 0
        return {number: version for number, version in versions.kept(self.versions).items() if number <= latest}

    def has(self, number: int) -> bool:
        """Whether the tunables are exactly those of a version; those of a cloud that has learnt nothing are its 0."""
        return number == 0 if self.state is None else versions.is_version(self.versions, number, self.state.tunables)

    def set_aside(self) -> int | None:
        """Keep what is in use as a version, where it is none; returns its number then."""
        if self.state is None or self.has(self.version):
            return None
        latest = self.state.latest + 1
        last = self.state.next_round - 1 if isinstance(self.state, EdgeState) else None
        versions.keep(self.versions, Version(latest, "set aside", None, last), self.state.tunables)
        self.state = replace(self.state, latest=latest)
        return latest

    def go_to(self, version: Version, tunables: Tunables) -> None:
        """Commit it as what is in use."""
        assert self.state is not None
        if self.state.tunables.keys() != tunables.keys():
            path = versions.path_of(self.versions, version.number)
            raise CheckpointError(f"{path} holds the tunables of another model; restore it, or choose another version")
        if isinstance(self.state, RelayState):
            self.state = self.state.back_to(version, tunables)
        else:
            self.state = replace(self.state, tunables=tunables, version=version.number)
        self.state.save(self.path)


def _carry_out(folder: Path, recipe: recipes.Recipe, node: _Node, version: Version) -> RolledBack:
    before, tunables = node.version, versions.load(node.versions, version.number)
    set_aside = None
    if node.version != version.number or not node.has(version.number):
        set_aside = node.set_aside()
        _record(folder, node, _told(before, version.number, set_aside))
        node.go_to(version, tunables)
    else:  # there is nothing to do, or the rest of a rollback that was cut off
        _record(folder, node, None)
    edge = None if node.is_cloud else node.node_id
    is_saved = (tuned_folder(folder, edge) / TUNABLES).exists()
    if is_saved:
        _replace_saved(folder, recipe, edge, tunables)
    return RolledBack(node.node_id, before, version.number, set_aside, is_saved)


def _replace_saved(folder: Path, recipe: recipes.Recipe, edge: str | None, tunables: Mapping[str, Tensor]) -> None:
    """Save the version in the place of what was saved, and judge it as that was judged."""
    replace_text(folder, tunables, recipe.tunables, edge)
    judge_again(folder)


def _told(before: int, to: int, set_aside: int | None) -> str:
    aside = "" if set_aside is None else f"; what it had then is version {set_aside}"
    return f"from version {before} to version {to}{aside}"


def _record(folder: Path, node: _Node, detail: str | None) -> None:
    """Write down a rollback where the run's records are, once; with None, what one of the places does not say yet."""
    logs = [path for path in (folder / NODES / "cloud" / RECORDS, folder / RECORDS) if path.exists()]
    told = [_last_told(path, node.node_id) for path in logs]
    done = next((one for one in told if one is not None and detail in (None, one.detail)), None)
    if done is None and detail is not None:
        last_round = node.state.next_round - 1 if isinstance(node.state, EdgeState) else None
        done = EventRecord("rolled_back", node.node_id, last_round, detail, time.time())
    for path, last in zip(logs, told, strict=True):
        if done is not None and done != last:
            append_line(path, to_line(done))


def _last_told(path: Path, node_id: str) -> EventRecord | None:
    """The rollback of a node that a log tells last, where it tells of no lesson since."""
    for record in reversed(read_records(read_lines(path), str(path))):
        if isinstance(record, EventRecord) and (record.event, record.node_id) == ("rolled_back", node_id):
            return record
        if isinstance(record, RelayRecord) and record.node_id == node_id and record.accepted:
            return None
    return None


def _checked(folder: Path) -> recipes.Recipe:
    """The recipe of a run that has versions."""
    recipe = load_recipe(folder)
    if recipe.task != "tune" or not recipe.relay.is_on:
        raise RunError(
            f"{folder} has no versions: its recipe has no relay; set relay.every or relay.drift for a new run"
        )
    if not (folder / NODES).exists():
        raise RunError(
            f"{folder} has no {NODES} folder: its nodes ran elsewhere, and the versions are on their disks, in relay/"
        )
    return recipe


def _busy(folder: Path) -> RunError:
    try:
        how = f"`kill {json.loads((folder / RUNNING).read_text())['pid']}` ends it in order"
    except (OSError, ValueError, KeyError):
        how = "end it"
    return RunError(
        f"{folder} belongs to a run that is going on: {how}; then roll back, and go on: `{resume_command(folder)}`"
    )


def _node_ids(recipe: recipes.Recipe) -> list[str]:
    topology = recipes.build_topology(recipe.topology)
    return [topology.cloud_id, *topology.edge_ids]


def _records(folder: Path) -> list[Record]:
    path = folder / NODES / "cloud" / RECORDS
    return read_records(read_lines(path), str(path))


def _listed(node: _Node, records: Sequence[Record]) -> list[Listed]:
    own = [record for record in records if isinstance(record, RelayRecord) and record.node_id == node.node_id]
    lessons = {record.version: record for record in own if record.accepted}
    return [_line(node, version, lessons.get(version.number)) for version in node.kept.values()]


def _line(node: _Node, version: Version, lesson: RelayRecord | None) -> Listed:
    in_use = version.number == node.version
    return Listed(
        node.node_id,
        version.number,
        version.what,
        version.cycle,
        version.round_index,
        lesson.time_s if lesson else None,
        lesson.scores if lesson else (),
        in_use,
        in_use and not node.has(version.number),
    )
