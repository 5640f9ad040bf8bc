"""Whether an edge's domain has drifted, told from losses; what the cloud remembers of those who do not come."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from ecogen.config import Relay
from ecogen.metering.meter import null_meter
from ecogen.models.adapters import load_whole
from ecogen.models.checkpoint import open_foundation
from ecogen.models.profile import shape_of
from ecogen.models.tunables import get_tunables
from ecogen.placement import Segment
from ecogen.records import RelayRecord, Taught
from ecogen.relay.cloud_learner import Exchange
from ecogen.relay.cloud_state import RelayState, Remembered, remaining
from ecogen.relay.drift import DriftWatch, p_value
from ecogen.relay.generator import Generator
from ecogen.relay.samples import Samples
from ecogen.relay.teacher import Lesson
from ecogen.relay.versions import Version
from ecogen.runtime.stage import Stage
from ecogen.runtime.worker import Worker
from ecogen.transport.base import TrafficCounter
from ecogen.tuning.captions import digit_caption
from ecogen.tuning.pairs import Pairs
from ecogen.tuning.passages import Passages
from tests.pictures import LENGTH, pair_recipe, save_pair_foundation

LOSSES = st.lists(st.floats(0.1, 9.0), min_size=8, max_size=60)
CAPTIONS = st.lists(st.sampled_from(["one", "two", "three", "four"]), max_size=20)


@given(LOSSES, LOSSES)
def test_a_p_value(known: list[float], newest: list[float]) -> None:
    found = p_value(known, newest)
    assert 0 <= found <= 1
    assert p_value(newest, known) == pytest.approx(found)
    assert p_value([math.exp(loss) for loss in known], [math.exp(loss) for loss in newest]) == pytest.approx(found), (
        "it is of their order alone"
    )
    assert p_value(known, known[::-1]) == pytest.approx(1)


def test_how_often_a_drift_is_told_wrongly_and_how_often_it_is_found() -> None:
    """Of 60 pairs then and 60 now: at most as often as the level says; a shift by one deviation nearly always."""
    generator = np.random.default_rng(5)

    def told(shift: float) -> int:
        draws = [(generator.gamma(3, size=60), generator.gamma(3, size=60) + shift) for _ in range(600)]
        return sum(p_value(known, newest) < 0.01 for known, newest in draws)

    assert told(0.0) <= 600 * 0.01 + 2 * math.sqrt(600 * 0.01 * 0.99)
    assert told(math.sqrt(3)) > 590


class Losses:
    """In place of a generator: the loss of a pair is its number times the model's."""

    def losses(self, tunables: Mapping[str, Tensor], passages: Sequence[float]) -> list[float]:
        return [float(tunables["factor"]) * value for value in passages for _ in range(2)]


def watch(path: Path, pairs: Mapping[int, Sequence[float]], level: float = 0.01) -> DriftWatch:
    return DriftWatch(Losses(), path, pairs.__getitem__, level)  # type: ignore[arg-type]


def test_both_are_looked_at_by_the_model_of_the_last_exchange(tmp_path: Path) -> None:
    """A model that has been tuned since tells nothing of its pairs; pairs of another domain do, once."""
    before, then, once = torch.tensor(1.0), torch.tensor(50.0), list(np.linspace(1, 2, 40))
    pairs = {0: once, 1: [value + 0.001 for value in once], 2: [value + 2 for value in once]}
    own = watch(tmp_path / "known", pairs)
    assert own.look(0, {"factor": before}) is None, "nothing is known before the first"
    assert own.look(1, {"factor": then}) is None
    found = own.look(2, {"factor": then})
    assert found is not None
    assert found < 1e-9
    assert watch(tmp_path / "known", pairs).look(2, {"factor": then}) == found, "it is on disk"
    own.remember(2, {"factor": then})
    assert own.look(2, {"factor": before}) is None
    assert own.look(1, {"factor": before}) is not None


def test_who_does_not_look_keeps_nothing(tmp_path: Path) -> None:
    own = watch(tmp_path / "known", {}, level=0)
    own.remember(0, {"factor": torch.tensor(1.0)})
    assert own.look(1, {"factor": torch.tensor(1.0)}) is None
    assert not [*tmp_path.iterdir()]


def test_a_pairs_loss(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The losses of single pairs make the perplexity of all; logits take no more room than in an evaluation."""
    recipe, foundation = pair_recipe(save_pair_foundation(tmp_path)), open_foundation(tmp_path)
    stage = Stage(load_whole(foundation, foundation.config, recipe.tunables, 0))
    worker = Worker(null_meter("edge-0"), TrafficCounter())
    shape = shape_of(foundation.config, recipe)
    generator = Generator(stage, tmp_path, shape, worker, Relay(), LENGTH)
    images = torch.rand(70, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    passages: Passages = generator.writer.both(Pairs(images, [digit_caption(place % 10) for place in range(70)]))
    tunables = get_tunables(stage.model)
    losses, counted = generator.losses(tunables, passages), (passages.labels >= 0).sum(1).tolist()
    assert len(losses) == 140
    mean = sum(loss * count for loss, count in zip(losses, counted, strict=True)) / sum(counted)
    assert math.exp(mean) == pytest.approx(generator.perplexity(passages)(tunables), rel=1e-5)
    flops = worker.usage("relay").flops
    assert flops > 0
    short = passages.trimmed()
    assert short.tokens.shape[1] < passages.tokens.shape[1]
    generator.losses(tunables, short)
    generator.perplexity(passages)(tunables)
    assert worker.usage("relay").flops == pytest.approx(flops), "padding costs nothing, whoever measures"
    most, numbers, infer = 400 * shape.num_labels, list[int](), stage.infer

    def counted_infer(segment: Segment, inputs: Tensor) -> Tensor:
        logits = infer(segment, inputs)
        numbers.append(logits.numel())
        return logits

    monkeypatch.setattr(stage, "infer", counted_infer)
    monkeypatch.setattr("ecogen.tuning.evaluate._LOGITS", most)
    assert generator.losses(tunables, passages) == pytest.approx(losses, rel=1e-5)
    assert max(numbers) <= most, "of all logits that there are at once"
    worker.close()


def some(captions: Sequence[str], evidence: int = 3) -> Samples:
    codes = torch.arange(len(captions))[:, None] * torch.tensor([1, 0, 2])
    return Samples(codes, list(captions), dict.fromkeys(captions, evidence))


@given(CAPTIONS, CAPTIONS, CAPTIONS)
def test_what_remains_of_earlier_lessons(earlier: list[str], other: list[str], now: list[str]) -> None:
    """Of who teaches, the captions that it teaches nothing of now; of others all, with their evidence."""
    taught = {"edge-0": Remembered(some(earlier), 0), "edge-1": Remembered(some(other), 1)}
    rest = remaining(taught, {"edge-0": some(now)})
    kept = [caption for caption in earlier if caption not in now]
    assert list(rest["edge-0"].captions if "edge-0" in rest else []) == kept
    assert list(rest["edge-1"].captions if "edge-1" in rest else []) == other
    for samples in rest.values():
        assert set(samples.evidence) == set(samples.captions)
        assert len(samples) == len(samples.codes) > 0


@given(CAPTIONS, CAPTIONS)
def test_what_the_cloud_knows_comes_back_from_disk(
    tmp_path_factory: pytest.TempPathFactory, drawn: list[str], told: list[str]
) -> None:
    record = RelayRecord("cloud", 4, "up", ("edge-0",), True, 2, 9, 8, 7, (Taught("a", 2.0, 1.0, True),), 0.5, ())
    state = RelayState(
        {"weight": torch.ones(2)},
        4,
        1,
        {"edge-0": 6},
        2,
        5,
        Lesson(some(drawn), 30),
        {"edge-1": Remembered(some(told), 3)},
        record,
    )
    path = tmp_path_factory.mktemp("cloud") / "state"
    state.save(path)
    loaded = RelayState.load(path)
    assert [loaded.number, loaded.cycle, loaded.alone, loaded.version, loaded.latest] == [4, 1, {"edge-0": 6}, 2, 5]
    assert loaded.record == record
    assert loaded.tunables.keys() == {"weight"}
    assert loaded.lesson is not None
    assert loaded.lesson.num_drawn == 30
    assert list(loaded.lesson.samples.captions) == drawn
    assert list(loaded.taught["edge-1"].samples.captions) == told
    assert torch.equal(loaded.taught["edge-1"].samples.codes, state.taught["edge-1"].samples.codes)
    before = loaded.back_to(Version(1, "after", 2), {"weight": torch.zeros(2)})
    assert (before.version, before.latest, before.number, before.lesson) == (1, 5, 4, None)
    assert not before.taught, "it was taught that after the version"
    assert loaded.back_to(Version(1, "after", 3), {}).taught.keys() == {"edge-1"}


def test_random_numbers_of_exchanges_differ() -> None:
    exchanges = [
        Exchange("schedule", 1, 3),
        Exchange("schedule", 2, 5),
        Exchange("drift", 1, 1, "edge-0"),
        Exchange("drift", 1, 1, "edge-1"),
        Exchange("drift", 2, 2, "edge-1"),
    ]
    assert len({tuple(own.key(seed)) for own in exchanges for seed in (0, 1)}) == 10
