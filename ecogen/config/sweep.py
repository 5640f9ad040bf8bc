"""A recipe with a `[sweep]` is a study: the runs behind a table, one recipe a row, each over the same seeds."""

from __future__ import annotations

import copy
import dataclasses
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import field
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from ecogen.config.nodes import build_topology, is_unformed
from ecogen.config.problems import explain
from ecogen.config.reading import SWEEP, from_table, override, read_table
from ecogen.config.schema import Recipe
from ecogen.config.types import STRICT, Natural, Share
from ecogen.errors import ConfigError


@dataclass(frozen=True, config=STRICT)
class Reference:
    """What somebody else reports: accuracy after the first and after the last round."""

    first: Share
    last: Share


@dataclass(frozen=True, config=STRICT)
class Case:
    """What a `[[sweep.cases]]` says.

    Attributes:
        change: what is different from the recipe, as a recipe's sections.
        part: the part of the table that it stands in.
        beside: whether classifiers that see all its training images in one place stand beside it.
    """

    name: Annotated[str, Field(min_length=1)]
    change: Mapping[str, Any] = field(default_factory=dict)
    part: Annotated[str, Field(pattern=r"^[a-z_]+$")] = "table"
    reference: Reference | None = None
    beside: bool = False


@dataclass(frozen=True, config=STRICT)
class Sweep:
    """What a `[sweep]` says.

    Attributes:
        source: where the references are from.
        target: the accuracy at which the rows of a part are compared by what it took to reach it; None: 99 % of the
            best row's last.
    """

    cases: Annotated[tuple[Case, ...], Field(min_length=1)]
    seeds: Annotated[tuple[Natural, ...], Field(min_length=1)] = (0, 1, 2, 3, 4)
    source: str = ""
    target: Share | None = None


@dataclasses.dataclass(frozen=True)
class Row:
    """A case with its recipe, whose seed is that of each run in turn."""

    case: Case
    recipe: Recipe

    @property
    def num_clusters(self) -> int:
        """Of all edges; those that forming will make of a pool too."""
        topology = self.recipe.topology
        per_edge = topology.clusters_per_edge
        if is_unformed(topology) and per_edge != "auto":
            return topology.edges * per_edge
        return len(build_topology(topology).clusters)

    @property
    def slug(self) -> str:
        """The name of its folder."""
        return _slug(self.case.name)


@dataclasses.dataclass(frozen=True)
class Study:
    """All rows of a table, and the seeds that each is run with."""

    name: str
    sweep: Sweep
    rows: tuple[Row, ...]


def load_study(source: str | Path, overrides: Sequence[str] = ()) -> Study | None:
    """The study of a recipe with a `[sweep]`; None if it has none.

    Args:
        source: a built-in name or a TOML path.
        overrides: `"a.b=value"` each; they win over what a case changes.

    Raises:
        ConfigError: with every problem and its place.
    """
    table, name = read_table(source)
    if SWEEP not in table:
        return None
    own = [text for text in overrides if text.strip().startswith(f"{SWEEP}.")]
    problems = override(table, own)
    try:
        sweep = TypeAdapter(Sweep).validate_python(table.pop(SWEEP))
    except ValidationError as error:
        raise ConfigError([*problems, *explain(error, Sweep, within=(SWEEP,))], name) from None
    problems += [*_mixed_up(sweep)]
    if problems:
        raise ConfigError(problems, name)
    others = [text for text in overrides if text not in own]
    rows = tuple(Row(case, _recipe(table, case, others, f"{name}, case {case.name!r}")) for case in sweep.cases)
    if unmeasured := [row.case.name for row in rows if row.recipe.evaluation.split == "none"]:
        text = f"evaluation.split: a study is a table of accuracies; choose 'test' or 'validation' for {unmeasured}"
        raise ConfigError([text], name)
    if texts := [row.case.name for row in rows if row.recipe.data.is_text]:
        text = (
            f"data.name: a study is a table of accuracies, which language models have none of; run {texts} one by one"
        )
        raise ConfigError([text], name)
    return Study(rows[0].recipe.name, sweep, rows)


def _mixed_up(sweep: Sweep) -> Iterator[str]:
    """What would put two runs into one folder."""
    slugs = [_slug(case.name) for case in sweep.cases]
    for case, slug in zip(sweep.cases, slugs, strict=True):
        if not slug:
            yield f"{SWEEP}.cases: {case.name!r} gives no name for a folder; use letters or digits"
    for slug in filter(None, dict.fromkeys(slugs)):
        names = [case.name for case, other in zip(sweep.cases, slugs, strict=True) if other == slug]
        if len(names) > 1:
            yield f"{SWEEP}.cases: {', '.join(map(repr, names))} would share the folder {slug!r}; name them apart"
    if len(set(sweep.seeds)) < len(sweep.seeds):
        yield f"{SWEEP}.seeds: give each seed once, not {list(sweep.seeds)}"


def _slug(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def _recipe(table: Mapping[str, Any], case: Case, overrides: Sequence[str], name: str) -> Recipe:
    changed = _merged(table, case.change)
    recipe = from_table(changed, name, override(changed, overrides))
    if is_unformed(recipe.topology) and recipe.topology.clusters_per_edge == "auto":
        raise ConfigError(["topology.clusters_per_edge: a row of a study has a number of clusters, not 'auto'"], name)
    return recipe


def _merged(table: Mapping[str, Any], change: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of the table with the change in it, section by section."""
    merged = copy.deepcopy(dict(table))
    for key, value in change.items():
        old = merged.get(key)
        if isinstance(old, Mapping) and isinstance(value, Mapping):
            merged[key] = _merged(old, value)
        else:
            merged[key] = copy.deepcopy(value)
    return merged
