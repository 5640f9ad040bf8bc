"""What a teacher draws for a lesson and hands on of it, and what a node is billed for it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import Tensor

from ecogen.config import Relay
from ecogen.errors import DataError
from ecogen.metering.meter import null_meter
from ecogen.models.adapters import load_whole
from ecogen.models.checkpoint import open_foundation
from ecogen.models.family import whole_segment
from ecogen.models.pair_model import Drawn
from ecogen.models.profile import shape_of
from ecogen.models.tunables import get_tunables
from ecogen.planning.cost import forward_flops
from ecogen.relay.generator import Generator
from ecogen.relay.samples import Samples
from ecogen.relay.teacher import Lesson, rehearse, teach
from ecogen.runtime.stage import Stage
from ecogen.runtime.worker import Worker
from ecogen.transport.base import TrafficCounter
from tests.pictures import LENGTH, pair_recipe, save_pair_foundation

ONE, TWO = "one", "two"
EVIDENCE = {TWO: 5, ONE: 7}


class Artist:
    """In place of a model: its pictures are their places, and it is surer of those of odd ones."""

    def __init__(self) -> None:
        self.temperatures: list[float] = []

    def draw(self, captions: Sequence[str], _: torch.Generator, *, temperature: float, on_done: object = None) -> Drawn:
        self.temperatures.append(temperature)
        self.asked = list(captions)
        codes = torch.arange(len(captions))[:, None].expand(-1, 4)
        return Drawn(codes, captions, torch.zeros(len(captions)), cast(Any, None))  # no picture is asked for

    def describe_codes(self, _: Tensor, *, on_done: object = None) -> list[str]:
        return self.asked

    def caption_log_likelihood(self, codes: Tensor, captions: Sequence[str], *, on_done: object = None) -> Tensor:
        assert list(captions) == self.asked
        return -1.0 / (1 + codes[:, 0] % 2)


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


@pytest.mark.parametrize("times", [2.0, 3.0])
def test_the_surest_of_more_are_handed_on(times: float) -> None:
    artist = Artist()
    lesson = teach(cast(Any, artist), EVIDENCE, 20, generator(), 0.9, times=times)
    assert artist.temperatures == [0.9]
    assert lesson.num_drawn == len(artist.asked) == 20 * times
    assert Counter(lesson.samples.captions) == {ONE: 10, TWO: 10}
    assert lesson.samples.evidence == EVIDENCE
    assert (lesson.samples.codes % 2 == 1).all(), "it is surest of these"


@pytest.mark.parametrize(
    ("evidence", "number", "times"), [({}, 4, 2.0), ({ONE: 1}, 0, 2.0), ({ONE: 1}, 4, 0.9), ({ONE: 1}, 4, float("nan"))]
)
def test_a_lesson_of_nothing_is_refused(evidence: dict[str, int], number: int, times: float) -> None:
    with pytest.raises(DataError, match="ask for 1 or more"):
        teach(cast(Any, Artist()), evidence, number, generator(), 1.0, times=times)


def test_what_is_rehearsed_is_as_various_as_what_is_known() -> None:
    artist = Artist()
    drawn = rehearse(cast(Any, artist), EVIDENCE, 9, generator())
    assert artist.temperatures == [1.0]
    assert len(drawn) == len(artist.asked) == 9
    assert sorted(Counter(drawn.captions).values()) == [4, 5]


def test_lessons_are_billed_by_what_is_computed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[object] = []

    def taught(_: object, evidence: object, number: int, __: object, temperature: float) -> Lesson:
        given.append((evidence, number, temperature))
        return Lesson(Samples(torch.zeros(0, 1), [], {}), 12)

    monkeypatch.setattr("ecogen.relay.generator.teach", taught)
    folder = save_pair_foundation(tmp_path)
    opened, recipe = open_foundation(folder), pair_recipe(folder)
    stage = Stage(load_whole(opened, opened.config, recipe.tunables, 0))
    worker = Worker(null_meter("cloud"), TrafficCounter())
    spec, shape = Relay(every=1, temperature=0.9), shape_of(opened.config, recipe)
    made = Generator(stage, folder, shape, worker, spec, LENGTH)
    pass_flops = forward_flops(shape.seeing(made._num_tokens([ONE])), whole_segment(opened.config), 1)
    made.teach(get_tunables(stage.model), {ONE: 1}, 6, [0])
    assert given == [({ONE: 1}, 6, 0.9)]
    assert worker.usage("relay").flops == pytest.approx(36 * pass_flops), "drawn, described and judged"
    made.rehearse(get_tunables(stage.model), {ONE: 1}, 6, [0])
    assert worker.usage("relay").flops == pytest.approx(6 * pass_flops)
    worker.close()
