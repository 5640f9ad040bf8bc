"""LoRA of unequal ranks: products are averaged as dense matrices would be, and every error is the dense one."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from ecogen.config import Aggregation, Recipe
from ecogen.records import RoundRecord
from ecogen.tuning.aggregate import Update
from ecogen.tuning.ranks import LoraRanks, Product
from ecogen.tuning.strategies import fedavg, median
from tests.runs import run

RANKS = LoraRanks(alpha=8.0, how="products")
NAMES = ("vit.layers.0.attention.q_proj", "vit.layers.1.attention.v_proj")
SPEC = Aggregation()


def factors(rank: int, seed: int, *, outputs: int = 9, inputs: int = 7, name: str = NAMES[0]) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    a, b = (torch.randn(shape, generator=generator) for shape in ((rank, inputs), (outputs, rank)))
    return {f"{name}.lora_A.weight": a, f"{name}.lora_B.weight": b}


def tunables(rank: int, seed: int) -> dict[str, Tensor]:
    """LoRA of two modules, and a head."""
    generator = torch.Generator().manual_seed(seed)
    both = factors(rank, seed) | factors(rank, seed + 50, name=NAMES[1])
    return both | {"classifier.bias": torch.randn(3, generator=generator)}


def updates_of(*ranks: int, seed: int = 0) -> list[Update]:
    return [Update(f"c{i}", tunables(rank, seed + 100 * i), 10 + 5 * i) for i, rank in enumerate(ranks)]


def dense(ranks: LoraRanks, tensors: Mapping[str, Tensor], name: str = NAMES[0]) -> np.ndarray:
    """alpha / r times B A, or alpha / sqrt(r), multiplied out."""
    a, b = (tensors[f"{name}.lora_{part}.weight"].double().numpy() for part in "AB")
    return ranks.alpha / (len(a) ** 0.5 if ranks.root_of_rank else len(a)) * b @ a


def dense_mean(ranks: LoraRanks, updates: list[Update], name: str = NAMES[0]) -> np.ndarray:
    weights = [update.num_examples for update in updates]
    return np.average([dense(ranks, update.tunables, name) for update in updates], axis=0, weights=weights)


def nearest(matrix: np.ndarray, rank: int) -> np.ndarray:
    u, singular, vt = np.linalg.svd(matrix, full_matrices=False)
    return u[:, :rank] * singular[:rank] @ vt[:rank]


def together(ranks: LoraRanks, before: Mapping[str, Tensor], updates: list[Update]) -> dict[str, Tensor]:
    return ranks.put_together(before, updates, {}, fedavg, SPEC).tunables


@pytest.mark.parametrize("root_of_rank", [False, True])
@given(st.lists(st.integers(1, 4), min_size=1, max_size=4), st.integers(4, 6), st.integers(0, 99))
def test_the_mean_of_products_is_the_dense_one_cut_to_the_edges_rank(
    root_of_rank: bool, own: list[int], rank: int, seed: int
) -> None:
    ranks, before, updates = LoraRanks(8.0, root_of_rank, "products"), tunables(rank, 7), updates_of(*own, seed=seed)
    result = ranks.put_together(before, updates, {}, fedavg, SPEC)
    missed, whole = 0.0, 0.0
    for name in NAMES:
        truth = dense_mean(ranks, updates, name)
        np.testing.assert_allclose(dense(ranks, result.tunables, name), nearest(truth, rank), atol=1e-4)
        missed += ((dense(ranks, result.tunables, name) - truth) ** 2).sum()
        whole += (truth**2).sum()
    assert result.error == pytest.approx((missed / whole) ** 0.5, rel=1e-6, abs=1e-9)
    if sum(own) <= rank:
        assert result.error < 1e-6
    weights = [update.num_examples for update in updates]
    bias = np.average([update.tunables["classifier.bias"].numpy() for update in updates], axis=0, weights=weights)
    np.testing.assert_allclose(result.tunables["classifier.bias"].numpy(), bias, rtol=1e-5)
    assert {name: tensor.shape for name, tensor in result.tunables.items()} == {
        name: tensor.shape for name, tensor in before.items()
    }


def test_the_product_of_a_mean_of_factors_is_not_the_mean_of_products() -> None:
    """So that the strategy is worth its name: what FedAvg does with equal ranks has an error too."""
    updates = updates_of(2, 2)
    plain, _ = fedavg(tunables(2, 7), updates, {}, SPEC)
    assert RANKS.error(plain, tunables(2, 7), updates) > 0.3
    assert not np.allclose(dense(RANKS, plain), dense_mean(RANKS, updates), atol=0.1)


@given(st.lists(st.integers(1, 4), min_size=1, max_size=4), st.integers(4, 6), st.integers(0, 99))
def test_the_mean_of_changes_is_the_dense_one_added_to_what_the_edge_had(own: list[int], rank: int, seed: int) -> None:
    ranks, before, updates = LoraRanks(8.0), tunables(rank, 7), updates_of(*own, seed=seed)
    result, name = ranks.put_together(before, updates, {}, fedavg, SPEC), NAMES[1]
    had = dense(ranks, before, name)
    changes = [dense(ranks, u.tunables, name) - nearest(had, r) for u, r in zip(updates, own, strict=True)]
    truth = had + np.average(changes, axis=0, weights=[update.num_examples for update in updates])
    np.testing.assert_allclose(dense(ranks, result.tunables, name), nearest(truth, rank), atol=2e-4)


@pytest.mark.parametrize(("how", "left"), [("changes", 1.0), ("products", 0.5)])
def test_what_a_cluster_has_no_room_for_fades_unless_changes_are_averaged(how: Any, left: float) -> None:
    """Two clusters that learn nothing, of ranks 1 and 2: the second direction stays, or is halved."""
    ranks, before = LoraRanks(8.0, how=how), tunables(2, 3)
    updates = [Update(f"c{rank}", ranks.cut(before, rank), 5) for rank in (1, 2)]
    had, has = dense(ranks, before), dense(ranks, together(ranks, before, updates))
    np.testing.assert_allclose(has, nearest(had, 1) + left * (had - nearest(had, 1)), atol=1e-5)


@given(st.integers(1, 5), st.integers(0, 99))
def test_a_cluster_begins_with_the_nearest_product_of_its_rank(rank: int, seed: int) -> None:
    whole = tunables(5, seed)
    own = RANKS.cut(whole, rank)
    assert len(own[f"{NAMES[0]}.lora_A.weight"]) == rank
    np.testing.assert_allclose(dense(RANKS, own), nearest(dense(RANKS, whole), rank), atol=1e-4)
    assert torch.equal(own["classifier.bias"], whole["classifier.bias"])


def test_a_cluster_of_the_edges_rank_begins_with_the_very_factors() -> None:
    whole = tunables(3, 0)
    for most in (3, 9, None):
        assert all(torch.equal(own, whole[name]) for name, own in RANKS.cut(whole, most).items())


def test_where_nothing_was_learned_yet_every_cluster_can_learn() -> None:
    """With B zero A keeps directions of its own, at its length: were both zero, neither had a gradient."""
    begun = tunables(4, 0)
    for name in NAMES:
        begun[f"{name}.lora_B.weight"].zero_()
    a = begun[f"{NAMES[0]}.lora_A.weight"].double()
    for rank in (1, 2, 3):
        own = RANKS.cut(begun, rank)[f"{NAMES[0]}.lora_A.weight"].double()
        torch.testing.assert_close(own @ own.T, torch.eye(rank, dtype=torch.float64) * (a**2).sum() / 4)
    after = together(RANKS, begun, [Update("c", RANKS.cut(begun, 1), 3)])
    assert after[f"{NAMES[0]}.lora_A.weight"].norm(dim=1).min() > 0.1
    assert not after[f"{NAMES[0]}.lora_B.weight"].any()


def test_padded_factors_are_averaged_with_zeros_and_the_edges_scale() -> None:
    ranks, before, updates = LoraRanks(8.0, how="factors"), tunables(3, 7), updates_of(1, 3)
    after = together(ranks, before, updates)
    (one, three), name = (update.tunables for update in updates), NAMES[0]
    a = torch.zeros(3, 7)
    a[:1] = one[f"{name}.lora_A.weight"]
    b = torch.zeros(9, 3)
    b[:, :1] = one[f"{name}.lora_B.weight"] * (8 / 1) / (8 / 3)
    torch.testing.assert_close(after[f"{name}.lora_A.weight"], 0.4 * a + 0.6 * three[f"{name}.lora_A.weight"])
    torch.testing.assert_close(after[f"{name}.lora_B.weight"], 0.4 * b + 0.6 * three[f"{name}.lora_B.weight"])
    own = ranks.cut(before, 2)
    assert torch.equal(own[f"{name}.lora_A.weight"], before[f"{name}.lora_A.weight"][:2])
    b = before[f"{name}.lora_B.weight"][:, :2] @ own[f"{name}.lora_A.weight"] * (8 / 3)
    torch.testing.assert_close(torch.tensor(dense(ranks, own)).float(), b)


def test_factors_of_one_rank_are_put_together_by_any_strategy() -> None:
    ranks, updates = LoraRanks(8.0, how="factors"), updates_of(3, 3, 3)
    result = ranks.put_together(tunables(3, 7), updates, {}, median, SPEC)
    plain, _ = median(tunables(3, 7), updates, {}, SPEC)
    assert all(torch.equal(result.tunables[name], tensor) for name, tensor in plain.items())


def test_equal_updates_change_no_product() -> None:
    update = updates_of(4)[0]
    after = together(RANKS, tunables(4, 7), [Update(f"c{i}", update.tunables, 3 + i) for i in range(3)])
    for name in NAMES:
        np.testing.assert_allclose(dense(RANKS, after, name), dense(RANKS, update.tunables, name), atol=1e-5)


@given(st.integers(1, 12), st.integers(0, 99))
def test_a_product_is_decomposed_without_being_formed(inner: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    left, right = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in ((9, inner), (inner, 7)))
    u, singular, vt = Product(left, right).decompose()
    truth = np.linalg.svd((left @ right).numpy(), compute_uv=False)[: len(singular)]
    np.testing.assert_allclose(singular.numpy(), truth, atol=1e-9)
    np.testing.assert_allclose((u * singular @ vt).numpy(), (left @ right).numpy(), atol=1e-9)
    assert Product(left, right).norm == pytest.approx(float((left @ right).norm()))


# A federation with them.

OWN = {"edge-0.cluster-0": 1, "edge-1.cluster-1": 2}


def unequal(recipe_of: Callable[..., Any], **aggregation: str) -> Recipe:
    return recipe_of(
        topology={"edges": 2},
        tunables={"lora_rank": 3, "cluster_ranks": OWN, "head": True},
        aggregation=aggregation,
        evaluation={"requests": 2},
    )


@pytest.mark.parametrize("lora", ["auto", "products", "factors"])
async def test_a_federation_of_unequal_ranks_runs_answers_and_states_its_error(
    recipe_of: Callable[..., Any], tmp_path: Any, lora: str
) -> None:
    done = await run(unequal(recipe_of, lora=lora), tmp_path)
    assert len(done.tunables[f"{NAMES[0]}.lora_A.weight"]) == 3
    rounds = [record for record in done.records if isinstance(record, RoundRecord)]
    of_edges = [record.lora_error for record in rounds if record.node_id != "cloud"]
    assert len(of_edges) == 4
    assert all(error is not None and 0 <= error < 1.5 for error in of_edges)
    assert any(error > 0.01 for error in of_edges)
    of_cloud = [record.lora_error for record in rounds if record.node_id == "cloud"]
    assert all((error is not None) == (lora != "factors") for error in of_cloud)


async def test_where_ranks_are_equal_and_factors_averaged_no_error_is_stated(
    recipe_of: Callable[..., Any], tmp_path: Any
) -> None:
    done = await run(recipe_of(), tmp_path)
    assert {record.lora_error for record in done.records if isinstance(record, RoundRecord)} == {None}


async def test_a_single_cluster_of_equal_rank_learns_the_same_with_products(
    recipe_of: Callable[..., Any], tmp_path: Any
) -> None:
    """One round: afterwards the same product has other factors, which an optimizer takes elsewhere."""
    sections = {"topology": {"clusters_per_edge": 1}, "tuning": {"rounds": 1}}
    plain = await run(recipe_of(**sections), tmp_path / "plain")
    exact = await run(recipe_of(**sections, aggregation={"lora": "products"}), tmp_path / "exact")
    ranks = LoraRanks(alpha=16.0)
    for name in NAMES[:1]:
        np.testing.assert_allclose(dense(ranks, exact.tunables, name), dense(ranks, plain.tunables, name), atol=1e-5)
