"""A question that means the same is given an earlier one's answer; an opposite one, or anybody else's, never is."""

from __future__ import annotations

import logging
import tomllib
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any

import pytest

from ecogen.config import Semantic, Serving, from_table
from ecogen.engines.serving import check_serving
from ecogen.errors import ConfigError, ServingError
from ecogen.serving.calibration import calibrate, threshold_of, upper_bound
from ecogen.serving.desk import Generate
from ecogen.serving.gateway import Gateway
from ecogen.serving.generation import Finish, GenerationRequest, Taken, Wording
from ecogen.serving.pairs import OWN_PAIRS, Pair, read_all_pairs, read_pairs
from ecogen.serving.sampling import Chosen, Sampling
from ecogen.serving.semantic import SemanticAnswers, from_config
from tests.models.decoders import save_decoder
from tests.serving.federations import serving, tiny_recipe

ASKED, AGAIN = "How do I enable dark mode?", "Could you tell me how to enable dark mode?"
OPPOSITE = "How do I disable dark mode?"
END = 9
SAID = [Chosen(5, -0.1), Chosen(END, -0.2)]
REQUEST = GenerationRequest("m", (1, 2), Sampling(temperature=0), 4, frozenset({END}), "anna", Wording(ASKED, "c"))
WANTED = Generate("a", REQUEST, "v1")
HELD_OUT = Path(__file__).parents[2] / "benchmarks" / "data" / "questions.toml"


class Clock:
    now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


def answers_of(room: int = 9, threshold: float | None = 0.9, nbytes: float = 1e6, clock: Clock | None = None) -> Any:
    return SemanticAnswers(room, threshold, age_s=60, nbytes=nbytes, clock=clock or Clock())


def worded(text: str, **changes: Any) -> Generate:
    """The same request in other words, so with another prompt, and with other changes."""
    own = {name: changes.pop(name) for name in ("adapter_id", "given") if name in changes}
    context = changes.pop("context", "c")
    request = replace(REQUEST, prompt=(3, 4, 5), wording=Wording(text, context), **changes)
    return Generate("b", request, **{"adapter_id": "v1"} | own)


def test_a_paraphrase_hits() -> None:
    answers = answers_of()
    answers.keep(WANTED, SAID)
    assert answers.find(worded(AGAIN)) == (tuple(SAID), Taken(1.0, ASKED))


@pytest.mark.parametrize(
    "text",
    [
        OPPOSITE,
        "How do I not enable dark mode?",
        "Why do I enable dark mode?",
        "Should I enable dark mode?",
        "How do I enable dark mode again?",
        "How do I enable dark mode in Word?",
        "How do I enable light mode?",
        "How do I enable 2 dark modes?",
        "How do I enable all dark modes?",
        "How did I enable dark mode?",
        "Wie schalte ich den Dunkelmodus ein?",
    ],
)
def test_what_means_something_else_does_not(text: str) -> None:
    answers = answers_of()
    answers.keep(WANTED, SAID)
    assert answers.find(worded(text)) is None


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("How do I merge two files?", "How can 2 files be merged?"),
        ("Does salt affect sleep?", "Is sleep affected by salt?"),
        ("What's a lemma?", "Please explain what a lemma is"),
        ("how many bones has a cat", "How many bones does a cat have?"),
        ("Am I allowed to fly a kite?", "Is it permitted to fly kites?"),
    ],
)
def test_in_other_words(one: str, other: str) -> None:
    answers = answers_of()
    answers.keep(worded(one), SAID)
    assert answers.find(worded(other)) is not None


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("Is Portugal larger than Austria?", "Is Austria larger than Portugal?"),
        ("How do I get to Rome?", "How do I get from Rome?"),
        ("Does stress cause headaches?", "Is stress caused by headaches?"),
        ("Who is the king?", "Who was the king?"),
        ("Is 3 larger than 5?", "Is 5 larger than 3?"),
        ("How do I sort in C++?", "How do I sort in C#?"),
        ("What is your name?", "What is my name?"),
        ("Who is her great grandfather?", "Who is her great great grandfather?"),
        ("What is a book by Kant?", "What is a book on Kant?"),
        ("What is yoga?", "What does yoga do?"),
        ("Can he see me?", "Can I see him?"),
    ],
)
def test_the_same_words_do_not_make_the_same_question(one: str, other: str) -> None:
    answers = answers_of()
    answers.keep(worded(one), SAID)
    assert answers.find(worded(one)) is not None
    assert answers.find(worded(other)) is None


@pytest.mark.parametrize(
    "changes",
    [
        {"tenant": "ben"},
        {"adapter_id": "v2"},
        {"model": "other"},
        {"context": "d"},
        {"ends": frozenset()},
        {"max_new": 1},
        {"given": (5,)},
        {"sampling": Sampling(temperature=0, logit_bias=((1, 2.0),))},
        {"sampling": Sampling(temperature=0, grammar="x")},
        {"sampling": Sampling(temperature=0.5, seed=1)},
        {"sampling": Sampling(temperature=0.5)},
    ],
    ids=str,
)
def test_under_other_circumstances_never(changes: dict[str, Any]) -> None:
    answers = answers_of()
    answers.keep(WANTED, SAID)
    assert answers.find(worded(AGAIN, **changes)) is None


def test_what_is_drawn_by_chance_or_has_no_wording_is_not_kept() -> None:
    answers = answers_of()
    answers.keep(worded(ASKED, sampling=Sampling(temperature=1)), SAID)
    answers.keep(Generate("a", replace(REQUEST, wording=None), "v1"), SAID)
    assert len(answers) == 0


def test_an_answer_that_was_cut_is_given_with_the_same_length_only() -> None:
    answers = answers_of()
    answers.keep(WANTED, SAID[:1])
    assert answers.find(worded(AGAIN, max_new=5)) is None
    assert answers.find(worded(AGAIN)) is not None


def test_room_is_bounded() -> None:
    answers = answers_of(room=2)
    for topic in ("cats", "dogs"):
        answers.keep(worded(f"What do {topic} eat?"), SAID)
    answers.find(worded("What do cats eat?"))
    answers.keep(worded("What do birds eat?"), SAID)
    found = [answers.find(worded(f"What do {topic} eat?")) is not None for topic in ("cats", "dogs", "birds")]
    assert found == [True, False, True]
    small = answers_of(nbytes=20000)
    for number in range(9):
        small.keep(worded(f"What is {number} times 7?"), SAID * 20)
    assert len(small) == 1


def test_age_is_bounded() -> None:
    clock = Clock()
    answers = answers_of(clock=clock)
    answers.keep(WANTED, SAID)
    clock.now_s = 61
    assert answers.find(worded(AGAIN)) is None
    assert len(answers) == 0


@pytest.mark.parametrize("off", [{"room": 0}, {"threshold": None}], ids=str)
def test_off(off: dict[str, Any]) -> None:
    answers = answers_of(**off)
    answers.keep(WANTED, SAID)
    assert not answers.is_on
    assert answers.find(worded(ASKED)) is None
    assert not from_config(Serving().semantic).is_on


# The threshold.


def test_a_bound_as_clopper_and_pearson_have_it() -> None:
    assert upper_bound(0, 300) == pytest.approx(1 - 0.05 ** (1 / 300))
    assert upper_bound(3, 3) == upper_bound(0, 0) == 1


def test_the_threshold_keeps_the_budget() -> None:
    same, opposite = [1.0, 0.9, 0.8, 0.7], [0.75] * 10 + [0.2] * 990
    assert threshold_of(same, opposite, 0.01).threshold == 0.8
    wide = threshold_of(same, opposite, 0.02)
    assert (wide.threshold, wide.num_hits, wide.num_false) == (0.7, 4, 10)
    assert 0.01 < wide.bound <= 0.02
    assert threshold_of(same, opposite[:200], 0.01).threshold is None, "too few to know"
    assert threshold_of([1.0], [0.0] * 300, 0.01).threshold == 1.0, "the strictest of those that hit as much"


def test_own_pairs_keep_the_budget_that_is_the_default() -> None:
    seen = calibrate(read_pairs(OWN_PAIRS), Semantic().false_hits)
    assert seen.threshold is not None
    assert seen.bound <= 0.01
    assert seen.num_hits > seen.num_same / 2


def test_what_is_measured_on_is_not_what_was_chosen_by() -> None:
    """Neither a question nor a topic nor a template."""
    chosen_by, measured_on = (parts_of(path) for path in (OWN_PAIRS, HELD_OUT))
    for one, other in zip(chosen_by, measured_on, strict=True):
        assert one
        assert other
        assert not one & other


def parts_of(path: Path) -> tuple[set[str], set[str], set[str]]:
    """Questions, parts of topics, and templates."""
    sets = tomllib.loads(path.read_text())["sets"]
    rows = [row for each in sets for row in (*each["same"], *chain(*each["opposite"].values()))]
    topics = {part for each in sets for topic in each["topics"] for part in topic}
    return {text for pair in read_all_pairs(path) for text in (pair.first, pair.second)}, topics, set(chain(*rows))


def test_a_budget_that_cannot_be_kept(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        assert not from_config(Semantic(answers=5, false_hits=0.001)).is_on
    assert "stay off: of 744 opposite pairs no threshold" in caplog.text
    assert "raise serving.semantic.false_hits or give more serving.semantic.pairs" in caplog.text


def test_pairs_of_ones_own(tmp_path: Path) -> None:
    path = tmp_path / "pairs.toml"
    path.write_text(
        'same = [["How is A?", "Tell me how A is"]]\n'
        "[opposite]\n"
        'name = [["What is A?", "What is B?"]]\n'
        "[[sets]]\n"
        'name = "s"\n'
        'topics = [["x", "y"]]\n'
        'same = [["Is {0}?", "Is it {0}?"]]\n'
        'linked = [["Is {0}?", "{0}?"]]\n'
    )
    by_hand = Pair("What is A?", "What is B?", "name", "by hand")
    assert read_pairs(path)[1:] == [by_hand, Pair("Is x?", "Is it x?", "same", "s")]
    assert len(read_all_pairs(path)) == 4
    path.write_text('same = [["one"]]')
    with pytest.raises(ServingError, match=r"pairs\.toml holds no pairs of questions that can be read"):
        from_config(Semantic(answers=5, pairs=str(path)))


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"false_hits": 0}, "false_hits"),
        ({"false_hits": 0.9}, "false_hits"),
        ({"answers": -1}, "answers"),
        ({"age_s": 0}, "age_s"),
        ({"anwsers": 5}, "answers"),
    ],
    ids=str,
)
def test_recipes_that_are_refused(wrong: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=rf"serving\.semantic.*{said}"):
        from_table({"serving": {"semantic": wrong}})


# At an edge.


async def said(gateway: Gateway, text: str | None, **changes: Any) -> tuple[list[int], Finish]:
    """The answer to a question whose tokens are the letters of its wording."""
    prompt = tuple(3 + ord(letter) % 90 for letter in text or "xyz")
    wording = None if text is None else Wording(text, "c")
    request = GenerationRequest("tiny", prompt, Sampling(temperature=0), 12, wording=wording)
    told = [one async for one in gateway.generate(replace(request, **changes))]
    assert isinstance(told[-1], Finish)
    return [one.token for one in told if isinstance(one, Chosen)], told[-1]


async def test_at_an_edge(tmp_path: Path) -> None:
    model = tmp_path / "tiny"
    save_decoder("llama", model)
    spec = Serving(slots=1, max_tokens=64, semantic=Semantic(answers=8))
    async with serving(tiny_recipe(model, devices=1, serving=spec), tmp_path) as (gateway, _):
        first, finish = await said(gateway, ASKED)
        assert finish.taken is None
        assert finish.node_ids
        again, finish = await said(gateway, AGAIN)
        assert again == first
        assert finish.taken == Taken(1.0, ASKED)
        assert not finish.node_ids
        assert finish.bill.energy_j.mid == 0
        for text, changes in ((OPPOSITE, {}), (AGAIN, {"wording": None}), (AGAIN, {"tenant": "ben"})):
            _, finish = await said(gateway, text, **changes)
            assert finish.taken is None
            assert finish.node_ids
        asked, finish = await said(gateway, "Please, how can I enable dark mode?", max_new=5)
        assert len(asked) == 5
        assert finish.taken is None, "the other answer was cut at another length"


async def test_off_by_default(tmp_path: Path) -> None:
    model = tmp_path / "tiny"
    save_decoder("llama", model)
    async with serving(tiny_recipe(model, devices=1), tmp_path) as (gateway, _):
        for text in (ASKED, AGAIN):
            assert (await said(gateway, text))[1].taken is None


def test_pairs_that_are_not_there_are_told_before_anything_starts(tmp_path: Path) -> None:
    save_decoder("llama", tmp_path / "tiny")
    spec = Serving(semantic=Semantic(answers=1, pairs="nowhere.toml"))
    with pytest.raises(ServingError, match=r"nowhere\.toml holds no pairs"):
        check_serving(tiny_recipe(tmp_path / "tiny", serving=spec))
