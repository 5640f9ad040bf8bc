"""Who answers: whoever has least to do, unless another has begun what begins alike."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from ecogen.serving.balance import SLACK, Balancer
from ecogen.serving.slots import WORTH

SYSTEM = tuple(range(2 * WORTH))


def test_the_one_with_the_fewest() -> None:
    assert Balancer[str]().choose({"a": 3, "b": 1, "c": 2}, (1, 2)) == "b"


def test_what_begins_alike_goes_where_it_began_if_there_is_not_too_much() -> None:
    balancer = Balancer[str]()
    assert balancer.choose({"a": 1, "b": 0}, (*SYSTEM, 7)) == "b"
    assert balancer.choose({"a": 0, "b": SLACK}, (*SYSTEM, 8)) == "b"
    assert balancer.choose({"a": 0, "b": SLACK + 1}, (*SYSTEM, 9)) == "a"
    assert balancer.choose({"a": SLACK, "b": 0}, (*SYSTEM, 9)) == "a", "there it began since"
    assert balancer.choose({"a": 1, "b": 0}, (*SYSTEM, 9), "tuned") == "b", "an adapter makes something else of it"
    assert balancer.choose({"a": 1, "b": 0}, SYSTEM[: WORTH - 1]) == "b", "too short to be worth it"


def test_the_longest_beginning_counts() -> None:
    balancer = Balancer[str]()
    long = (*SYSTEM, *range(100, 100 + WORTH))
    balancer.choose({"a": 1, "b": 0}, long)
    balancer.choose({"a": 0, "b": 9}, SYSTEM)
    assert balancer.choose({"a": 0, "b": 1}, (*long, 5)) == "b"


def test_who_is_gone_is_not_chosen() -> None:
    balancer = Balancer[str]()
    balancer.choose({"a": 0}, SYSTEM)
    assert balancer.choose({"b": 5}, SYSTEM) == "b"


@given(
    st.lists(
        st.tuples(
            st.dictionaries(st.sampled_from("abc"), st.integers(0, 9), min_size=1),
            st.lists(st.integers(0, 1), max_size=70).map(tuple),
        )
    )
)
def test_nobody_is_ever_given_much_more_than_the_least(asked: list[tuple[dict[str, int], tuple[int, ...]]]) -> None:
    balancer = Balancer[str]()
    for loads, prompt in asked:
        assert loads[balancer.choose(loads, prompt)] <= min(loads.values()) + SLACK
