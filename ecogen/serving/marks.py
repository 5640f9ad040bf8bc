"""What a question is about, by its words; and what tells two that are nearly alike apart.

A similarity hardly sees opposites: "enable" and "disable" stand in the same sentences. So two questions are taken for
the same only where they agree in all that is looked for here. It knows English only, from `words.toml`.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

_TOKEN = re.compile(r"\d+(?:[.,:]\d+)*|[A-Za-z]+(?:'[a-z]+)?")
_ASKING = re.compile(
    r"(?:since|until) when|how (?:many|much|long|often|far|old|tall|big|fast|heavy)|how|why|when|where|who"
)
_WHETHER = re.compile(r"(?:is|are|am|was|were|do|does|did|can|could|may|might|must|should|would|will|has|have|had) ")
_SYMBOL = re.compile(r"[^\w\s?.,!;:'\"()-]|_|(?<!\w)-")
_MODAL = ("possible", "necessary")
_ENDING = 3  # letters by which forms of a word may differ in the end
_LONGEST = 40
"""Words of a question; of longer ones little is known."""


@dataclass(frozen=True, slots=True)
class Marks:
    """What is looked for in a question.

    Attributes:
        asking: how, why, when, ...; "whether" where yes or no answers; empty for others, such as what.
        words: all of them, in lower case.
        core: those it is about, numbers in digits; who does something comes before what is done.
        numbers: of these.
        symbols: in their order.
        names: what has a capital within the sentence.
        classes: of which it has a word.
        persons: of whom it speaks.
    """

    asking: str
    words: frozenset[str]
    core: tuple[str, ...]
    numbers: tuple[str, ...]
    symbols: tuple[str, ...]
    names: frozenset[str]
    classes: frozenset[str]
    persons: frozenset[str]


def marks_of(question: str) -> Marks | None:
    """What there is to look for; None in what is too long, or not English as far as that can be seen."""
    spelled = _spelled(question)
    lower = [token.lower() for token in spelled]
    if not question.isascii() or not _known().english & set(lower) or len(lower) > _LONGEST:
        return None
    words, known = _active(_plain(lower)), _known()
    counted = [_counted(before, word) for before, word in zip(("", *words), words, strict=False)]
    return Marks(
        _asking(" ".join(_plain(lower))),
        frozenset(words),
        tuple(word for word in counted if word not in known.light),
        tuple(word for word in counted if word[0].isdigit()),
        tuple(_SYMBOL.findall(question)),
        frozenset(token.lower() for token in spelled[1:] if token != "I" and token[0].isupper()),
        frozenset(name for name, members in known.classes.items() if _has(words, name, members)),
        frozenset(name for name, members in known.persons.items() if members & set(words)),
    )


def difference(one: Marks, other: Marks) -> str | None:
    """Why two questions cannot be known to mean the same; None where nothing is in the way."""
    return next((reason for reason, agree in _GUARDS.items() if not agree(one, other)), None)


def overlap(one: Marks, other: Marks) -> float:
    """The share of what two questions are about that is the same (Dice), 0 to 1."""
    total = len(one.core) + len(other.core)
    missing = _missing(one.core, other.core) + _missing(other.core, one.core)
    return 1 - missing / total if total else 0.0


def _spelled(question: str) -> list[str]:
    """Words as they are written, contractions in full."""
    text = question.replace("n't", " not").replace("can not", "cannot")
    for short, full in (("'s", " is"), ("'m", " am"), ("'d", " would"), ("'re", " are"), ("'ll", " will")):
        text = re.sub(rf"\b(what|how|where|who|when|why|it|i|you|we|they){short}\b", rf"\1{full}", text, flags=re.I)
    return [token.removesuffix("'s") for token in _TOKEN.findall(text)]


def _plain(words: Sequence[str]) -> list[str]:
    """Without politeness, and phrases as the words that they stand for."""
    text = f" {' '.join(words)} "
    while polite := next((each for each in _known().polite if text.startswith(f" {each} ")), None):
        text = text[len(polite) + 1 :]
    for phrase, word in _known().phrases.items():
        text = text.replace(f" {phrase} ", f" {word} ")
    return text.split()


def _active(words: list[str]) -> list[str]:
    """As if nothing were said in the passive: "is A moved by B" as "B moved A", "can A be moved" as "moved A"."""
    for at, word in enumerate(words):
        if word.endswith("ed") and words[at + 1 : at + 2] == ["by"]:
            return [*words[at + 2 :], word, *words[:at]]
        if word.endswith("ed") and words[max(0, at - 1)] == "be":
            return [word, *words[:at], *words[at + 1 :]]
    return words


def _asking(text: str) -> str:
    found = _ASKING.match(text)
    return found[0] if found else "whether" if _WHETHER.match(text) else ""


def _counted(before: str, word: str) -> str:
    """A word, or the digits that it stands for."""
    return word if word == "one" and before in _known().uncounted else _known().numbers.get(word, word)


def _has(words: Sequence[str], name: str, members: frozenset[str]) -> bool:
    """Two negations are none; of two forms of "do" the first only asks."""
    count = sum(word in members for word in words)
    return bool(count % 2) if name == "negation" else count > 1 if name == "doing" else bool(count)


def _are_in(names: frozenset[str], words: frozenset[str]) -> bool:
    return all({name, name.removesuffix("s"), f"{name}s"} & words for name in names)


def _exact_agree(one: Marks, other: Marks) -> bool:
    return not _known().exact & (one.words ^ other.words)


def _persons_agree(one: Marks, other: Marks) -> bool:
    """Whoever asks how, or whether, may leave out for whom."""
    is_open = one.asking == "whether" or one.asking.startswith("how")
    return one.persons == other.persons or (is_open and not (one.persons and other.persons))


def _classes_agree(one: Marks, other: Marks) -> bool:
    """What may and what must be differ where an answer turns on it, and each speaks of another."""
    differ = one.classes ^ other.classes
    turns = one.asking in ("whether", "who", "when", "where")
    return not (differ - set(_MODAL)) and not (turns and differ >= set(_MODAL))


def _missing(core: Sequence[str], other: Sequence[str]) -> int:
    """How many words one is about and the other is not; each counts once for each time."""
    left = list(other)
    for word in core:
        if (its := next((its for its in left if _are_alike(word, its)), None)) is not None:
            left.remove(its)
    return len(core) - (len(other) - len(left))


def _are_alike(one: str, other: str) -> bool:
    """The same word or another form of it, as far as its beginning says."""
    one, other = (word.removesuffix("s") if len(word) > _ENDING else word for word in (one, other))
    least = max(4, len(one) - _ENDING, len(other) - _ENDING)
    return one == other or (min(len(one), len(other)) >= least and one[:least] == other[:least])


def _are_in_order(one: Sequence[str], other: Sequence[str]) -> bool:
    """Whether what both are about comes in the same order."""
    places = [next((at for at, its in enumerate(other) if _are_alike(word, its)), None) for word in one]
    known = [place for place in places if place is not None]
    return known == sorted(known)


_GUARDS: Mapping[str, Callable[[Marks, Marks], bool]] = {  # quick ones first
    "asking": lambda one, other: one.asking == other.asking,
    "numbers": lambda one, other: one.numbers == other.numbers,
    "symbols": lambda one, other: one.symbols == other.symbols,
    "exact words": _exact_agree,
    "persons": _persons_agree,
    "classes": _classes_agree,
    "names": lambda one, other: _are_in(one.names, other.words) and _are_in(other.names, one.words),
    # no list can tell whether a word that stands for another is its synonym, its opposite or something else
    "other words": lambda one, other: not (_missing(one.core, other.core) and _missing(other.core, one.core)),
    "order": lambda one, other: _are_in_order(one.core, other.core),
}


@dataclass(frozen=True)
class _Known:
    """What `words.toml` holds."""

    polite: tuple[str, ...]
    phrases: Mapping[str, str]  # the longest first
    classes: Mapping[str, frozenset[str]]
    persons: Mapping[str, frozenset[str]]
    exact: frozenset[str]
    numbers: Mapping[str, str]
    light: frozenset[str]
    english: frozenset[str]
    uncounted: frozenset[str]


@cache
def _known() -> _Known:
    table = tomllib.loads(Path(__file__).with_name("words.toml").read_text())
    listed = {name: frozenset(words.split()) for name, words in table["lists"].items()}
    return _Known(
        tuple(table["polite"]),
        dict(sorted(table["phrases"].items(), key=lambda entry: -len(entry[0]))),
        {name: frozenset(words) for name, words in table["classes"].items()},
        {name: frozenset(words) for name, words in table["persons"].items()},
        listed["exact"],
        table["numbers"],
        listed["light"],
        listed["english"],
        listed["uncounted"],
    )
