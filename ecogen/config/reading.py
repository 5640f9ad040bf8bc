"""Recipes from built-in names, files, dictionaries and `--set`; and back to dictionaries."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any, TypeVar

from pydantic import TypeAdapter, ValidationError

from ecogen.config.contradictions import contradictions
from ecogen.config.problems import explain, problems_of
from ecogen.config.schema import Recipe, TopologyRecipe
from ecogen.errors import ConfigError

SectionType = TypeVar("SectionType")

_RECIPE: TypeAdapter[Recipe] = TypeAdapter(Recipe)
SWEEP = "sweep"
"""The section that makes a recipe a study."""

_COUNTS = ("edges", "clusters_per_edge", "devices_per_cluster")
_NUMBERED = re.compile(r"edge-(\d+)(?:\.field|\.device-\d+|\.cluster-(\d+)(?:\.device-(\d+))?)?")


def load(source: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """The recipe of a built-in name or a TOML path.

    Args:
        source: `"digits"`, say, or a path.
        overrides: `"a.b=value"` each, with the value as TOML or else a bare string.

    Raises:
        ConfigError: with every problem and its place.
    """
    table, name = read_table(source)
    if SWEEP in table:
        raise ConfigError(["it is a study of many runs; `ecogen run` carries it out, `load_study` reads it"], name)
    return from_table(table, name, override(table, overrides))


def from_table(table: Mapping[str, Any], source: str = "recipe", found: Sequence[str] = ()) -> Recipe:
    """A recipe from nested dictionaries, validated in one pass.

    Args:
        found: problems that are known already, to be told with the others.

    Raises:
        ConfigError: with every problem and its place.
    """
    try:
        recipe = _RECIPE.validate_python(table)
    except ValidationError as error:
        raise ConfigError([*found, *problems_of(table, error)], source) from None
    return checked(recipe, source, found)


def checked(recipe: Recipe, source: str = "recipe", found: Sequence[str] = ()) -> Recipe:
    """The recipe, if its values do not contradict each other.

    Args:
        found: problems that are known already, to be told with the others.

    Raises:
        ConfigError: with every problem and its place.
    """
    problems = [*found] + [contradiction.text for contradiction in contradictions(recipe)]
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
        raise ConfigError(explain(error, section_type), section_type.__name__) from None


def read_table(source: str | Path) -> tuple[dict[str, Any], str]:
    """The table of a built-in name or a TOML path, unchecked, and a name for messages.

    Raises:
        ConfigError: if it cannot be read, is no TOML or says nothing.
    """
    text, name = _read(source)
    try:
        table = tomllib.loads(text)
    except tomllib.TOMLDecodeError as problem:
        raise ConfigError([f"not TOML: {problem}"], name) from problem
    if not table:
        raise ConfigError(["it is empty; a recipe says at least its name"], name)
    return table, name


def override(table: dict[str, Any], overrides: Sequence[str]) -> list[str]:
    """Put values from outside into a recipe's table; returns what is wrong with them.

    Counts go first, and take along what the recipe says of nodes beyond them; what the caller says of such nodes stays,
    to be refused.
    """
    settings, problems = [], []
    for text in overrides:
        try:
            settings.append(_setting(text))
        except ValueError as problem:
            problems.append(f"--set: {problem}")
    counts = [(parts, value) for parts, value in settings if parts[:-1] == ["topology"] and parts[-1] in _COUNTS]
    blocked = [_put(table, *setting) for setting in counts]
    if counts and isinstance(table["topology"], dict):
        _drop_beyond(table)
    blocked += [_put(table, *setting) for setting in settings if setting not in counts]
    return problems + [f"--set: {problem}" for problem in blocked if problem]


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


def _setting(text: str) -> tuple[list[str], Any]:
    """The parts of the key and the value of `a.b=value`; what is no TOML value is a bare string."""
    key, equals, value_text = text.partition("=")
    if not equals:
        raise ValueError(f"{text!r} is not KEY=VALUE, for example tuning.rounds=4")
    try:
        value = tomllib.loads(f"value = {value_text}")
    except tomllib.TOMLDecodeError:
        value = {}
    return _parts(key), value["value"] if value.keys() == {"value"} else value_text


def _put(table: dict[str, Any], parts: Sequence[str], value: Any) -> str:
    """Set one value; returns what is in the way, if something is."""
    *path, last = parts
    for part in path:
        table = table.setdefault(part, {})
        if not isinstance(table, dict):
            return f"{'.'.join(parts)}: {part!r} is a value, not a section"
    table[last] = value
    return ""


def _parts(key: str) -> list[str]:
    """The parts of a dotted key as TOML has it; the dots of node ids, quoted or not, part nothing."""
    quoted = key if '"' in key or "'" in key else _NUMBERED.sub(r'"\g<0>"', key)
    try:
        level: Any = tomllib.loads(f"{quoted} = 0")
    except tomllib.TOMLDecodeError:
        raise ValueError(f"{key!r} is no key; write KEY=VALUE, for example tuning.rounds=4") from None
    parts = []
    while isinstance(level, dict):
        ((part, level),) = level.items()
        parts.append(part)
    return parts


def _drop_beyond(table: dict[str, Any]) -> None:
    """Leave out what a recipe says of edges, clusters and devices that an override has just taken away."""
    topology, default = table["topology"], TopologyRecipe()
    counts = [topology.get(name, getattr(default, name)) for name in _COUNTS]
    places = (
        ("compute", "nodes"),
        ("placement", "cuts_of"),
        ("faults", "update_factor"),
        ("faults", "slow"),
        ("tunables", "cluster_ranks"),
        ("data", "labels_of_edges"),
        ("data", "sources"),
    )
    others = [table[section].get(key) for section, key in places if isinstance(table.get(section), dict)]
    sections = (topology.get("sites"), topology.get("devices"), topology.get("clusters"), *others)
    for section in (section for section in sections if isinstance(section, dict)):
        for name in list(section):
            if (match := _NUMBERED.fullmatch(name)) and _is_beyond(match, counts):
                del section[name]


def _is_beyond(match: re.Match[str], counts: Sequence[Any]) -> bool:
    numbers = zip(match.groups(), counts, strict=True)
    return any(index is not None and isinstance(count, int) and int(index) >= count for index, count in numbers)
