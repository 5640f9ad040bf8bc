"""An edge's private rounds: a fixed denominator, one try, nobody named, nothing sent before it is kept."""

from __future__ import annotations

import asyncio
import math

import pytest
import torch
from torch import Tensor

from ecogen.config import Aggregation, Privacy
from ecogen.errors import NodeLostError
from ecogen.transport.base import Message, Peer
from ecogen.tuning.messages import Sampled, SyncOrder
from ecogen.tuning.privacy import ClusterPrivacy, ExamplePrivacy, epsilon
from ecogen.tuning.rounds import EdgeState
from tests.tuning.edges import Cloud, Edge, values

SPEC = Privacy(noise_multiplier=1.0, clip_norm=100.0, delta=0.1)


def no_noise(count: int) -> Tensor:
    return torch.zeros(count, dtype=torch.float64)


QUIET = ClusterPrivacy(SPEC, 1.0, 2, no_noise)


async def test_clusters_count_alike_however_many_examples_they_have(edge: Edge) -> None:
    """near adds 1 with 30 examples, far adds 5 with 10: 3 on average, where FedAvg has 2."""
    cloud = await edge.have_cloud(10.0)
    rounds = edge.rounds(privacy=QUIET, cloud_every=1)
    await rounds.run()
    assert cloud.sent == [{3.0}]
    assert cloud.orders == [SyncOrder(0, 2)]
    (record,) = edge.round_records
    assert (record.loss, record.num_examples, record.members, record.missing) == (None, 0, (), ())
    assert record.epsilon == pytest.approx(QUIET.epsilon(1))
    assert record.accuracy == 0.03


async def test_long_updates_are_clipped_over_all_their_tunables(edge: Edge) -> None:
    """Each of 6 coordinates moves by 1 or 5: norms sqrt 6 and 5 sqrt 6, both clipped to 1."""
    rounds = edge.rounds(privacy=ClusterPrivacy(Privacy(1.0, 1.0, 0.1), 1.0, 2, no_noise))
    await rounds.run()
    (value,) = values(rounds.state.tunables)
    assert value == pytest.approx(1 / math.sqrt(6))


async def test_a_lost_cluster_changes_no_denominator_and_is_not_told(edge: Edge) -> None:
    edge.devices["far-1"].problems = [NodeLostError("far-0", "gone")]
    rounds = edge.rounds(privacy=QUIET)
    await rounds.run()
    assert values(rounds.state.tunables) == {0.5}
    assert not edge.cluster_events


async def test_a_round_without_any_outcome_is_not_tried_again(edge: Edge) -> None:
    """Trying until somebody comes would be another draw than the accountant knows of."""
    for name in ("near-1", "far-1"):
        edge.devices[name].problems = [NodeLostError("elsewhere", "gone")]
    ones = ClusterPrivacy(SPEC, 1.0, 2, lambda count: torch.ones(count, dtype=torch.float64))
    rounds = edge.rounds(privacy=ones)
    await rounds.run()
    assert values(rounds.state.tunables) == {50.0}  # noise alone: 1 x 100 / 2
    assert rounds.state.next_round == 1
    assert edge.devices["near-0"].rounds == [0]


async def test_what_anybody_is_sent_is_on_disk_before(edge: Edge) -> None:
    """So a round that is done again with other noise has told nobody of the first."""
    found: list[set[float]] = []

    class Looking(Cloud):
        async def handle(self, peer: Peer, message: Message) -> Message:
            found.append(values(EdgeState.load(edge.path).tunables))
            return await super().handle(peer, message)

    cloud = Looking(10.0)
    await edge.network.join(Peer("cloud", "cloud")).serve(cloud)
    noisy = ClusterPrivacy(SPEC, 1.0, 2, lambda count: torch.ones(count, dtype=torch.float64))
    await edge.rounds(privacy=noisy, cloud_every=1, rounds=2).run()
    assert found == cloud.sent == [{53.0}, {63.0}]


async def test_a_server_optimiser_goes_on_with_the_noised_mean(edge: Edge) -> None:
    """FedAdam sees one update: its first step is rate x d (1 - b1) / (sqrt(b2 tau^2 + (1 - b2) d^2) + tau), d = 3."""
    spec = Aggregation(strategy="fedadam", server_rate=0.5, beta_1=0.9, beta_2=0.99, tau=1e-3)
    rounds = edge.rounds(aggregation=spec, privacy=QUIET)
    await rounds.run()
    (value,) = values(rounds.state.tunables)
    assert value == pytest.approx(0.5 * 0.3 / (math.sqrt(0.99e-6 + 0.01 * 9) + 1e-3), rel=1e-5)


async def test_a_round_in_which_nobody_takes_part_changes_nothing(edge: Edge) -> None:
    rounds = edge.rounds(participation=1e-9)
    await rounds.run()
    assert values(rounds.state.tunables) == {0.0}
    (record,) = edge.round_records
    assert (record.members, record.missing, record.loss, record.epsilon) == ((), (), None, None)
    assert not edge.devices["near-0"].rounds


async def test_a_sampled_round_waits_for_one_of_those_who_were_drawn(alone: Edge) -> None:
    """far is here, but near was drawn: it is waited for, and far is left in peace."""
    await alone.arrive("far-0", "far-1")
    rounds = alone.rounds(participation=0.5, rejoin_timeout_s=1)
    rounds._draw = lambda _: ["near"]  # type: ignore[method-assign]
    running = asyncio.create_task(rounds._tune_clusters(0))
    await asyncio.sleep(0.05)
    assert not running.done()
    await alone.arrive("near-0", "near-1")
    chosen, (outcome,) = await running
    assert chosen == ["near"]
    assert values(outcome.update.tunables) == {1.0}
    assert not alone.devices["far-0"].rounds


# Privacy of examples.

OF_EXAMPLES = ExamplePrivacy(Privacy(1.0, 1.0, 0.01, "example"))


async def test_of_examples_epsilon_is_that_of_the_device_that_spent_most(edge: Edge) -> None:
    edge.devices["near-0"].sampled, edge.devices["far-0"].sampled = Sampled(0.1, 4), Sampled(0.1, 8)
    rounds = edge.rounds(examples=OF_EXAMPLES, rounds=2)
    await rounds.run()
    spent = [record.epsilon for record in edge.round_records]
    assert spent == [epsilon(1.0, 0.1, 8 * number, 0.01) for number in (1, 2)]
    for record in edge.round_records:
        assert record.loss is None
        assert (record.num_examples, record.members) == (40, ("near", "far"))  # who took part is no secret


async def test_of_examples_an_edge_that_comes_back_forgets_nobody(edge: Edge) -> None:
    """Those of a cluster that is lost meanwhile were drawn before, and are as little protected as they were."""
    edge.devices["near-0"].sampled, edge.devices["far-0"].sampled = Sampled(0.1, 4), Sampled(0.1, 8)
    await edge.rounds(examples=OF_EXAMPLES).run()
    edge.devices["far-1"].problems = [NodeLostError("far-0", "gone")]
    await edge.rounds(EdgeState.load(edge.path), examples=OF_EXAMPLES, rounds=2).run()
    assert edge.round_records[-1].missing == ("far",)
    assert edge.round_records[-1].epsilon == epsilon(1.0, 0.1, 16, 0.01)
