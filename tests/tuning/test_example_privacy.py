"""Privacy of examples: a chain's noised step is DP-SGD of the whole model; no example moves it by more than C / E."""

from __future__ import annotations

import asyncio
import math
import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ecogen.config import Privacy, Recipe, from_table, load
from ecogen.config import Tunables as Spec
from ecogen.errors import CheckpointError, ConfigError, ProtocolError
from ecogen.metering.meter import null_meter
from ecogen.runtime.example_gradients import ExampleGradients, ExampleNoise, clip_factor, example_weights
from ecogen.runtime.neighbours import Neighbours
from ecogen.runtime.stage import MicrobatchKey, OptimizerSettings, Stage
from ecogen.runtime.worker import Worker
from ecogen.transport.base import Peer, TrafficCounter
from ecogen.transport.memory import MemoryNetwork
from ecogen.tuning.device import DeviceTuning
from ecogen.tuning.messages import Sampled
from ecogen.tuning.passages import IGNORED, Passages
from ecogen.tuning.privacy import ExamplePrivacy, epsilon, example_noise, secure_normal
from ecogen.tuning.sampling import Draws
from tests.texts import LENGTH, VOCABULARY, save_text_foundation
from tests.tuning.clusters import Tuned, tune_cluster
from tests.tuning.passages import TextCase, lora_of, plain_loss, random_passages
from tests.tuning.test_pairs import moved_data

SGD = OptimizerSettings(learning_rate=1.0, optimizer="sgd")
ADAMW = OptimizerSettings(learning_rate=1e-2, weight_decay=0.1, epsilon=1e-3)
EXPECTED = 4
CHAINS = [("start", (), 1), ("start", (2,), 1), ("start", (1, 2), 1), ("end", (1, 2), 1), ("start", (1, 2), 2)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_text_foundation(tmp_path_factory.mktemp("llama"))


def no_noise(count: int) -> Tensor:
    return torch.zeros(count, dtype=torch.float64)


def ones(count: int) -> Tensor:
    return torch.ones(count, dtype=torch.float64)


def noise(clip_norm: float, rows: int = 1, multiplier: float = 0.0) -> ExampleNoise:
    return ExampleNoise(clip_norm, multiplier, rows, ones)


def pairs(count: int, size: int, seed: int = 2) -> list[Passages]:
    """Batches of examples of two passages each."""
    return [replace(batch, rows=2) for batch in random_passages(count, 2 * size, seed)]


def tune(
    case: TextCase, batches: Sequence[Passages], protection: ExampleNoise, spec: OptimizerSettings = SGD, **more: Any
) -> Tuned:
    stages = case.stages(protection)
    given = {"expected": EXPECTED, "num_microbatches": 2} | more
    return asyncio.run(tune_cluster(case, case.tunables, batches, spec, stages=stages, **given))


def naive_step(plain: Any, batch: Passages, clip_norm: float) -> dict[str, Tensor]:
    """Abadi et al. 2016, Algorithm 1, as it is written: one example after the other, by the whole model."""
    named = lora_of(plain)
    total = {name: torch.zeros_like(parameter) for name, parameter in named.items()}
    for index in range(batch.num_examples):
        grads = torch.autograd.grad(plain_loss(plain, batch.examples([index])), list(named.values()))
        norm = math.sqrt(sum(float(grad.double().square().sum()) for grad in grads))
        for name, grad in zip(named, grads, strict=True):
            total[name] += grad * min(1.0, clip_norm / norm)
    return {name: tensor / EXPECTED for name, tensor in total.items()}


def naive(case: TextCase, batches: Sequence[Passages], clip_norm: float) -> dict[str, Tensor]:
    """Steps of rate 1 by the whole model."""
    plain = case.plain()
    for batch in batches:
        for name, mean in naive_step(plain, batch, clip_norm).items():
            lora_of(plain)[name].data -= mean
    return {name: parameter.detach() for name, parameter in lora_of(plain).items()}


def assert_alike(ours: dict[str, Tensor], theirs: dict[str, Tensor], atol: float = 2e-6) -> None:
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        torch.testing.assert_close(tensor, theirs[name], rtol=1e-4, atol=atol)


# A chain is the whole model.


@pytest.mark.parametrize(("labels", "cuts", "owners"), CHAINS)
@pytest.mark.parametrize("clip_norm", [0.05, 1e6])
def test_a_chains_steps_are_those_of_dp_sgd_example_by_example(
    folder: Path, labels: str, cuts: tuple[int, ...], owners: int, clip_norm: float
) -> None:
    """With examples of two passages, of unequal lengths, in batches of unequal sizes as Poisson draws have them."""
    case = TextCase(folder, cuts, labels, owners=owners)
    batches = [pairs(1, size, seed)[0] for seed, size in enumerate((3, 5, 1, 4))]
    tuned = tune(case, batches, noise(clip_norm, rows=2))
    assert_alike(tuned.tunables, naive(case, batches, clip_norm))
    assert all(not torch.equal(tensor, case.tunables[name]) for name, tensor in tuned.tunables.items())


def test_clipping_changes_something(folder: Path) -> None:
    """So that the equality above is not one of steps that are not clipped."""
    case, (batch,) = TextCase(folder), pairs(1, 3)
    clipped, free = (naive(case, [batch], clip_norm) for clip_norm in (0.05, 1e6))
    assert distance(clipped, case.tunables) < 0.5 * distance(free, case.tunables)


@pytest.mark.parametrize(("labels", "cuts", "owners"), CHAINS)
def test_without_noise_and_clipping_it_is_plain_tuning(
    folder: Path, labels: str, cuts: tuple[int, ...], owners: int
) -> None:
    """Of examples with as many tokens each: what is else averaged over tokens is averaged over examples here."""
    case = TextCase(folder, cuts, labels, owners=owners)
    generator = torch.Generator().manual_seed(4)
    rows = torch.randint(3, VOCABULARY, (3, EXPECTED, LENGTH + 1), generator=generator)
    batches = [Passages(part[:, :-1], part[:, 1:]) for part in rows]
    protected = tune(case, batches, noise(1e9), ADAMW)
    plain = asyncio.run(tune_cluster(case, case.tunables, batches, ADAMW, stages=case.stages(), num_microbatches=2))
    assert_alike(protected.tunables, plain.tunables, atol=1e-6)
    assert protected.results["device-0"].loss == pytest.approx(plain.results["device-0"].loss, rel=1e-5)


def test_decoders_with_recurrent_blocks_are_told_apart_too(tmp_path: Path) -> None:
    case = TextCase(save_text_foundation(tmp_path, "qwen3_next"))
    batches = pairs(2, 3)
    assert_alike(tune(case, batches, noise(0.05, rows=2)).tunables, naive(case, batches, 0.05))


# What one example can change.


def distance(left: dict[str, Tensor], right: dict[str, Tensor]) -> float:
    return math.sqrt(sum(float((left[name].double() - right[name].double()).square().sum()) for name in left))


@lru_cache(maxsize=1)
def small_case(folder: Path) -> TextCase:
    return TextCase(folder, (1,))


@settings(max_examples=12)
@given(seed=st.integers(0, 2**31), size=st.integers(1, 4), clip_norm=st.sampled_from([1e-3, 0.1, 2.0]))
def test_without_one_example_a_step_is_at_most_c_by_e_away(
    folder: Path, seed: int, size: int, clip_norm: float
) -> None:
    """Over all tunables of all devices, whatever the example is."""
    case, (batch,) = small_case(folder), pairs(1, size + 1, seed)
    with_it = tune(case, [batch], noise(clip_norm, rows=2)).tunables
    without = tune(case, [batch.examples(range(size))], noise(clip_norm, rows=2)).tunables
    assert 0 < distance(with_it, without) <= clip_norm / EXPECTED + 1e-6


def test_the_bound_is_reached(folder: Path) -> None:
    case, (batch,) = small_case(folder), pairs(1, 1)
    moved = distance(tune(case, [batch], noise(1e-3, rows=2)).tunables, case.tunables)
    assert moved == pytest.approx(1e-3 / EXPECTED, rel=1e-3)


@given(st.floats(0) | st.just(math.nan), st.floats(1e-6, 1e6))
def test_an_example_counts_at_most_c_and_one_that_is_no_number_not_at_all(squared: float, clip_norm: float) -> None:
    factor = clip_factor(squared, clip_norm)
    if not math.isfinite(squared):
        assert factor == 0
    else:
        assert factor * math.sqrt(squared) <= clip_norm * (1 + 1e-12)


def test_an_example_whose_gradient_is_no_number_moves_nothing() -> None:
    layer = torch.nn.Linear(2, 1, bias=False)
    gathered = ExampleGradients(layer, {"w": layer.weight}, noise(1e6))
    gathered.expect(0, 2, ["w"])
    layer(torch.tensor([[[1.0, 2.0]], [[math.inf, 0.0]]])).sum().backward()
    norms = gathered.squared_norms(0, ["w"])
    assert norms == [5.0, math.inf]
    assert gathered.noised_means(norms, 1)["w"].tolist() == [[1.0, 2.0]]


def test_norms_that_are_not_those_of_the_steps_examples_are_an_error() -> None:
    layer = torch.nn.Linear(2, 1, bias=False)
    gathered = ExampleGradients(layer, {"w": layer.weight}, noise(1.0))
    assert gathered.noised_means([1.0], 1) == {}  # a device that has no part in the step
    gathered.expect(0, 2, ["w"])
    with pytest.raises(ProtocolError, match=r"the norms of 3 examples came for a step on 2"):
        gathered.noised_means([1.0, 1.0, 1.0], 1)


# The noise.


@pytest.mark.parametrize(("labels", "cuts", "owners"), CHAINS)
def test_each_tunable_is_noised_once_a_step_with_the_deviation_of_the_accountant(
    folder: Path, labels: str, cuts: tuple[int, ...], owners: int
) -> None:
    """With noise that is always 1, three steps of rate 1 move each number by 3 z C / E beside what is learnt.

    A clip norm next to nothing keeps what is learnt, and so what noise changes of it, below what is looked at.
    """
    case = TextCase(folder, cuts, labels, owners=owners)
    batches, clip_norm, multiplier = pairs(3, 2), 1e-5, 50.0
    noised = tune(case, batches, noise(clip_norm, 2, multiplier)).tunables
    for name, tensor in noised.items():
        shift = case.tunables[name] - tensor
        expected = torch.full_like(shift, 3 * multiplier * clip_norm / EXPECTED)
        torch.testing.assert_close(shift, expected, rtol=0, atol=3 * clip_norm / EXPECTED + 1e-6)


def test_a_step_on_nobody_is_noise_alone(folder: Path) -> None:
    """Which Poisson draws come to, and which devices cannot tell from others by leaving it out."""
    case, (batch,) = TextCase(folder), pairs(1, 2)
    nothing = next(drawn(batch, NEVER))
    assert nothing.rows == 2
    assert set(nothing.labels.flatten().tolist()) == {IGNORED}
    still = tune(case, [nothing], noise(1.0, rows=2)).tunables
    assert distance(still, case.tunables) == 0
    noised = tune(case, [nothing], noise(1.0, 2, 2.0)).tunables
    for name, tensor in noised.items():
        torch.testing.assert_close(case.tunables[name] - tensor, torch.full_like(tensor, 2.0 / EXPECTED))


def test_the_noise_is_the_operating_systems_and_never_the_same_twice() -> None:
    found = example_noise(Privacy(1.5, 0.3, unit="example"), 2)
    assert found is not None
    assert (found.noise_multiplier, found.clip_norm, found.rows) == (1.5, 0.3, 2)
    assert found.normal is secure_normal
    assert example_noise(Privacy(1.5), 2) is None
    assert example_noise(Privacy(0.0, unit="example"), 2) is None


# Who is drawn.


class Always(random.Random):
    """Draws the same number again and again."""

    def __init__(self, number: float) -> None:
        super().__init__()
        self.number = number

    def random(self) -> float:
        return self.number


NEVER = Always(0.999)


def drawn(passages: Passages, source: random.Random, expected: int = 1) -> Any:
    return Draws(passages.num_examples, expected).batches(passages, source)


def numbered(count: int, rows: int = 2) -> Passages:
    """Passages whose tokens say which example they are of."""
    tokens = torch.arange(count).repeat_interleave(rows)[:, None].expand(-1, 3).contiguous()
    return Passages(tokens, tokens, rows=rows)


def test_examples_are_drawn_whole_each_with_the_rate_and_independently() -> None:
    passages, draws = numbered(200), Draws(200, 20)
    batches = [batch for seed in range(40) for batch in draws.batches(passages, random.Random(seed))]
    assert len(batches) == 40 * draws.num_steps == 400
    counts: Counter[int] = Counter()
    for batch in batches:
        ways = Counter(batch.tokens[:, 0].tolist())
        assert set(ways.values()) == {2}  # an example both ways, and once a step
        counts.update(ways.keys())
    assert len({len(batch) for batch in batches}) > 10
    deviation = math.sqrt(400 * draws.rate * (1 - draws.rate))
    assert all(abs(counts[index] - 400 * draws.rate) < 6 * deviation for index in range(200))


def test_microbatches_clusters_and_owners_never_part_an_example() -> None:
    passages = numbered(7)
    for count in (1, 2, 3, 7):
        parts = passages.split_examples(count)
        assert sum(part.num_examples for part in parts) == 7
        assert torch.equal(torch.cat([part.tokens for part in parts]), passages.tokens)
        for part in parts:
            assert set(Counter(part.tokens[:, 0].tolist()).values()) == {2}


def test_a_step_has_as_many_passages_as_a_batch_on_average() -> None:
    assert Draws.of(numbered(50), 24) == Draws(50, 12)
    assert (Draws(50, 12).rate, Draws(50, 12).num_steps) == (0.24, 5)
    assert Draws.of(numbered(5), 24) == Draws(5, 5)
    assert Draws.of(numbered(5, rows=1), 1) == Draws(5, 1)


@given(st.lists(st.integers(0, 5), min_size=1, max_size=4))
def test_an_examples_tokens_count_for_one_whatever_is_beside_it(counts: list[int]) -> None:
    labels = torch.full((2 * len(counts), 6), IGNORED)
    for index, count in enumerate(counts):
        labels[2 * index, :count] = 1
        labels[2 * index + 1, : count // 2] = 1
    sums = example_weights(labels, 2).view(len(counts), -1).sum(1)
    assert torch.allclose(sums, torch.tensor([float(count > 0) for count in counts]))


def test_what_moves_images_is_no_function_of_the_seed(folder: Path) -> None:
    """Whoever knows the recipe would know it: of the same round and epoch it is another each time."""
    case, (data, tuning) = TextCase(folder, cuts=()), moved_data()
    everybody = replace(tuning, batch_size=100)
    (stage,) = case.stages(noise(1.0, rows=2)).values()
    network = MemoryNetwork().join(Peer("device-0", "end"))
    neighbours = Neighbours(network, lambda *_: None, lambda _: None)
    worker = Worker(null_meter("device-0"), TrafficCounter())
    role = DeviceTuning(case.routes, everybody, stage, worker, neighbours, data)
    first, second = ([one.inputs for one in role._batches(data, 0, 0)] for _ in range(2))
    assert [len(one) for one in first] == [len(one) for one in second] == [8]
    assert not torch.equal(first[0], second[0])
    worker.close()


# What it costs.


def test_epsilon_is_the_librarys_of_the_steps_of_the_device_that_spent_most() -> None:
    from opacus.accountants import PRVAccountant

    accountant = PRVAccountant()
    accountant.history = [(1.1, 0.25, 24)]
    theirs = accountant.get_epsilon(1e-3)
    ours = ExamplePrivacy(Privacy(1.1, 1.0, 1e-3, "example"))
    few, many = Sampled(0.25, 2), Sampled(0.25, 8)
    assert ours.epsilon({few, many}, 3) == pytest.approx(theirs, rel=1e-9)
    assert ours.epsilon({few}, 3) < theirs
    assert ours.epsilon(set(), 3) == 0
    assert epsilon(1.1, 0.25, 24, 1e-3) == ours.epsilon({many}, 3)


# What cannot be told apart.


def test_tunables_that_are_no_linear_layers_weights_are_refused(folder: Path) -> None:
    with pytest.raises(CheckpointError, match=r"is no linear layer's weight, so examples' gradients cannot be told"):
        TextCase(folder, spec=Spec(prompts=0, head=False, lora_rank=2, lora_kind="dora")).stages(noise(1.0))


def test_layers_that_see_all_examples_tokens_together_are_refused() -> None:
    layer = torch.nn.Linear(2, 1, bias=False)
    gathered = ExampleGradients(layer, {"experts.w": layer.weight}, noise(1.0))
    gathered.expect(0, 2, ["experts.w"])
    with pytest.raises(CheckpointError, match=r"'experts.w' is given the tokens of all examples"):
        layer(torch.zeros(6, 2))


def recipe(**sections: Any) -> Recipe:
    table: dict[str, Any] = {"data": {"name": "documentation"}} | sections
    return from_table(table)


PRIVATE = ["privacy.unit=example", "privacy.noise_multiplier=1", "tuning.clip_norm=0"]


def test_the_recipe_pairs_may_be_private() -> None:
    assert load("pairs", PRIVATE).privacy.protects_examples


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("tuning.clip_norm=1", "tuning.clip_norm: each example's gradient is clipped by privacy.clip_norm"),
        ("tuning.proximal=0.1", "tuning.proximal: is a term of gradients that are not noised"),
        ("tunables.lora_kind=dora", "tunables.lora_kind: gradients are told apart by example of LoRA's factors only"),
        ("tuning.augmentation_views=2", "tuning.augmentation_views: images that come again are by the recipe's seed"),
        ("aggregation.strategy=scaffold", "aggregation.strategy: scaffold sends sums of gradients"),
        ("aggregation.buffer=1", "aggregation.buffer: epsilon counts rounds"),
        ("privacy.delta=0.01", r"privacy.delta: 0.01 is not below 1 / data.train = 0.00142857"),
    ],
)
def test_what_would_break_the_promise_is_refused(change: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        load("pairs", [*PRIVATE, change])


def test_images_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"data.name: images' gradients are not told apart by example"):
        load("digits", PRIVATE)


def test_a_whole_stage_gathers_any_order_of_microbatches(folder: Path) -> None:
    """Several are in flight, and come back as they come."""
    case, (batch,) = TextCase(folder, cuts=()), pairs(1, 4)
    (segment,) = case.held_by("device-0")
    steps = []
    for order in ((0, 1), (1, 0)):
        (stage,) = case.stages(noise(0.1, rows=2)).values()
        steps.append(one_step(stage, segment, case.tunables, batch, order))
    assert distance(*steps) == 0


def one_step(stage: Stage, segment: Any, tunables: Any, batch: Passages, order: Sequence[int]) -> dict[str, Tensor]:
    stage.begin(tunables, SGD)
    keys = [MicrobatchKey(0, index, 0) for index in range(2)]
    for key, part in zip(keys, batch.split_examples(2), strict=True):
        weights = example_weights(part.labels, part.rows)
        stage.loss(key, segment, part.tokens, part.labels, 1, weights=weights, input_grads=False)
    norms: dict[int, list[float]] = {}
    for index in order:
        stage.backward(keys[index], None)
        norms[index] = stage.example_norms(keys[index], segment)
    stage.noised_step([*norms[0], *norms[1]], EXPECTED)
    return stage.tunables
