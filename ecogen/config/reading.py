"""Recipes from built-in names, files, dictionaries and `--set`; and back to dictionaries."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any, TypeVar

from pydantic import TypeAdapter, ValidationError

from ecogen.config.problems import contradictions, explain, problems_of
from ecogen.config.schema import Recipe, TopologyRecipe
from ecogen.errors import ConfigError

SectionType = TypeVar("SectionType")

_RECIPE: TypeAdapter[Recipe] = TypeAdapter(Recipe)
_COUNTS = ("topology.edges", "topology.clusters_per_edge", "topology.devices_per_cluster")
_NUMBERED = re.compile(r"edge-(\d+)(?:\.field|\.cluster-(\d+)\.device-(\d+))?")


def load(source: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """The recipe of a built-in name or a TOML path.

    Args:
        source: `"digits"`, say, or a path.
        overrides: `"a.b=value"` each, with the value as TOML or else a bare string.

    Raises:
        ConfigError: with every problem and its place.
    """
    text, name = _read(source)
    try:
        table = tomllib.loads(text)
    except tomllib.TOMLDecodeError as problem:
        raise ConfigError([f"not TOML: {problem}"], name) from problem
    for override in overrides:
        _override(table, override)
    if any(override.strip().startswith(_COUNTS) for override in overrides):
        _drop_beyond(table)
    return from_table(table, name)


def from_table(table: Mapping[str, Any], source: str = "recipe") -> Recipe:
    """A recipe from nested dictionaries, validated in one pass.

    Raises:
        ConfigError: with every problem and its place.
    """
    try:
        recipe = _RECIPE.validate_python(table)
    except ValidationError as error:
        raise ConfigError(problems_of(table, error), source) from None
    problems = [contradiction.text for contradiction in contradictions(recipe)]
    if problems:
        raise ConfigError(problems, source)
    return recipe


def to_table(recipe: Recipe) -> dict[str, Any]:
    """The resolved recipe as nested dictionaries, every default filled in."""
    table: dict[str, Any] = _RECIPE.dump_python(recipe, mode="json")
    return table


def section_table(section: Any) -> dict[str, Any]:
    """One section as a dictionary, every default filled in."""
    table: dict[str, Any] = TypeAdapter(type(section)).dump_python(section, mode="json")
    return table


def section_from_table(section_type: type[SectionType], table: Mapping[str, Any]) -> SectionType:
    """One section from a dictionary.

    Raises:
        ConfigError: with every problem and its place.
    """
    try:
        return TypeAdapter(section_type).validate_python(table)
    except ValidationError as error:
        raise ConfigError([explain(problem) for problem in error.errors()], section_type.__name__) from None


def builtin_names() -> list[str]:
    """The recipes that come with EcoGen."""
    files = (resources.files("ecogen") / "recipes").iterdir()
    return sorted(file.name.removesuffix(".toml") for file in files if file.name.endswith(".toml"))


def _read(source: str | Path) -> tuple[str, str]:
    """Text and a name for messages. A bare name is a built-in recipe; anything else is a path."""
    if str(source) in builtin_names():
        return (resources.files("ecogen") / "recipes" / f"{source}.toml").read_text(), f"recipe {source!r}"
    try:
        return Path(source).read_text(), str(source)
    except (OSError, UnicodeDecodeError) as problem:
        names = ", ".join(builtin_names())
        reason = getattr(problem, "strerror", None) or str(problem)
        raise ConfigError([f"cannot read it: {reason}; built-in recipes: {names}"], str(source)) from problem


def _override(table: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals:
        raise ConfigError([f"{override!r} is not KEY=VALUE, for example tuning.rounds=4"], "--set")
    *path, last = _parts(key)
    for part in path:
        table = table.setdefault(part, {})
        if not isinstance(table, dict):
            raise ConfigError([f"{key}: {part!r} is a value, not a section"], "--set")
    try:
        table[last] = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        table[last] = text


def _parts(key: str) -> list[str]:
    """The parts of a dotted key as TOML has it; the dots of node ids, quoted or not, part nothing."""
    quoted = key if '"' in key or "'" in key else _NUMBERED.sub(r'"\g<0>"', key)
    try:
        level: Any = tomllib.loads(f"{quoted} = 0")
    except tomllib.TOMLDecodeError:
        raise ConfigError([f"{key!r} is no key; write KEY=VALUE, for example tuning.rounds=4"], "--set") from None
    parts = []
    while isinstance(level, dict):
        ((part, level),) = level.items()
        parts.append(part)
    return parts


def _drop_beyond(table: dict[str, Any]) -> None:
    """Leave out what a recipe says of edges, clusters and devices that an override has just taken away."""
    topology, default = table.get("topology", {}), TopologyRecipe()
    counts = [topology.get(name.partition(".")[2], getattr(default, name.partition(".")[2])) for name in _COUNTS]
    sections = (topology.get("sites"), topology.get("devices"), table.get("compute", {}).get("nodes"))
    for section in filter(None, sections):
        for name in [name for name in section if (match := _NUMBERED.fullmatch(name)) and _is_beyond(match, counts)]:
            del section[name]


def _is_beyond(match: re.Match[str], counts: Sequence[Any]) -> bool:
    numbers = zip(match.groups(), counts, strict=True)
    return any(index is not None and isinstance(count, int) and int(index) >= count for index, count in numbers)
