"""Stop strings are found however the text is cut, and nothing of them is shown."""

from __future__ import annotations

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from ecogen.serving.openai.stops import StopSearch

TEXTS = st.text("ab\n", max_size=30)
STOPS = st.lists(st.text("ab\n", min_size=1, max_size=4), max_size=4)


def cut(text: str, places: list[int]) -> list[str]:
    """The text in pieces, some of them empty."""
    edges = [0, *sorted(min(place, len(text)) for place in places), len(text)]
    return [text[begin:stop] for begin, stop in pairwise(edges)]


def shown(pieces: list[str], stops: list[str]) -> tuple[str, bool]:
    search, text = StopSearch(stops), ""
    for piece in pieces:
        more, is_over = search.take(piece)
        text += more
        if is_over:
            return text, True
    return text + search.rest(), False


def plainly(text: str, stops: list[str]) -> tuple[str, bool]:
    """Character by character, looking at everything so far each time."""
    for length in range(1, len(text) + 1):
        begins = [length - len(stop) for stop in stops if text[:length].endswith(stop)]
        if begins:
            return text[: min(begins)], True
    return text, False


@given(TEXTS, STOPS, st.lists(st.integers(0, 30), max_size=8))
def test_any_cut_shows_what_one_character_at_a_time_does(text: str, stops: list[str], places: list[int]) -> None:
    assert shown(cut(text, places), stops) == plainly(text, stops)


@given(TEXTS, STOPS)
def test_only_what_may_begin_a_stop_is_held_back(text: str, stops: list[str]) -> None:
    search, seen = StopSearch(stops), ""
    for length, character in enumerate(text, 1):
        more, is_over = search.take(character)
        seen += more
        held = text[len(seen) : length]
        if is_over:
            return
        assert not held or any(stop.startswith(held) and stop != held for stop in stops)
