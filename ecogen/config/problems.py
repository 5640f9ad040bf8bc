"""What is wrong with a recipe, all of it at once, each problem with its place, its value and the nearest valid one."""

from __future__ import annotations

import copy
import dataclasses
import difflib
import typing
from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import TypeAdapter, ValidationError

from ecogen.config.contradictions import contradictions
from ecogen.config.schema import Recipe

Place = tuple[str, ...]

_WORDS = {
    "dataclass_type": "input should be a section",
    "dict_type": "input should be a section",
    "tuple_type": "input should be a list",
    "too_short": "list has too few values",
    "int_parsing": "input should be a whole number",
    "int_from_float": "input should be a whole number",
    "bool_parsing": "input should be true or false",
    "bool_type": "input should be true or false",
}
"""What the types of pydantic's problems are called here, where its own words are those of Python."""

_DEPTH = 8  # of nested sections, of which each may go for want of a value in it


def problems_of(table: Mapping[str, Any], error: ValidationError) -> list[str]:
    """What a table that could not be read has wrong: every value by itself, and what the others contradict."""
    problems = explain(error)
    recipe, dropped = _readable_part(table, error)
    told = tuple(f"{place}." for place in dropped)
    return problems + [
        contradiction.text
        for contradiction in contradictions(recipe)
        if not any(f"{place}.".startswith(told) for place in contradiction.places)
    ]


def explain(error: ValidationError, section: Any = Recipe, *, within: Place = ()) -> list[str]:
    """Each of pydantic's problems with a section in a sentence; those of a union's branches in one.

    Args:
        within: where the section is.
    """
    found: dict[Place, list[Any]] = {}
    for problem in error.errors():
        found.setdefault(_place(problem), []).append(problem)
    # A branch that got further is the one that was meant.
    meant = [place for place in found if not any(other != place and other[: len(place)] == place for other in found)]
    return [_sentence(place, found[place], section, within) for place in meant]


def _readable_part(table: Mapping[str, Any], error: ValidationError) -> tuple[Recipe, set[str]]:
    """The recipe without what is wrong by itself, and the places of that."""
    dropped: set[str] = set()
    for _ in range(_DEPTH):
        # What lacks a value that has no default goes as a whole.
        wrong = [_place(problem)[: -1 if problem["type"] == "missing" else None] for problem in error.errors()]
        dropped |= {".".join(place) for place in wrong}
        table = _without(table, wrong)
        try:
            return TypeAdapter(Recipe).validate_python(table), dropped
        except ValidationError as next_error:
            error = next_error
    return Recipe(), dropped


def _sentence(place: Place, problems: Sequence[Any], section: Any, within: Place) -> str:
    """One problem, or what each branch of a union has against the same value."""
    kind, at, key = problems[0]["type"], ".".join((*within, *place)) or "the whole", place[-1] if place else ""
    if kind == "missing":
        return f"{at}: is required"
    is_unknown = kind == "unexpected_keyword_argument"
    names = [name for name in _keys_at(section, place[:-1]) if name != key]
    close = difflib.get_close_matches(key, names, n=1, cutoff=0.5 if is_unknown else 0.8)
    hint = f"did you mean {close[0]!r}?" if close else f"valid keys: {', '.join(names)}"
    if is_unknown:
        return f"{at}: unknown key; {hint}"
    first, *others = (_WORDS.get(problem["type"], problem["msg"]) for problem in problems)
    text = " or ".join([first, *(other.removeprefix("input should be ") for other in others)])
    sentence = f"{at}: {text[0].lower()}{text[1:]}, not {problems[0]['input']!r}"
    return f"{sentence}; {hint}" if kind == "dataclass_type" and close else sentence


def _place(problem: Any) -> Place:
    """Where a problem is; pydantic names the branch of a union too, which people do not want to read."""
    return tuple(str(part) for part in problem["loc"] if not _is_branch(part))


def _is_branch(part: Any) -> bool:
    return isinstance(part, str) and part.startswith(("literal[", "tuple["))


def _without(table: Mapping[str, Any], places: Sequence[Place]) -> dict[str, Any]:
    """A copy that says nothing at those places; of a list, nothing at all."""
    rest = copy.deepcopy(dict(table))
    for place in places:
        section: Any = rest
        for index, part in enumerate(place):
            if not isinstance(section.get(part), dict) or index == len(place) - 1:
                section.pop(part, None)
                break
            section = section[part]
    return rest


def _keys_at(section: Any, path: Sequence[Any]) -> list[str]:
    """The valid keys of the section at `path` in another."""
    for part in path:
        if dataclasses.is_dataclass(section):
            section = typing.get_type_hints(section).get(str(part))
        elif typing.get_origin(section) is not None:
            section = typing.get_args(section)[0 if typing.get_origin(section) is tuple else -1]
    return [f.name for f in dataclasses.fields(section)] if dataclasses.is_dataclass(section) else []
