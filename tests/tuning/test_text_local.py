"""The local steps of a cluster that tunes a decoder equal plain fine-tuning with `peft` on one machine."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from ecogen.config import Tunables as Spec
from ecogen.planning.cost import activation_bytes
from ecogen.runtime.prefix_cache import PrefixCache, prefix_keys
from ecogen.runtime.stage import MicrobatchKey, OptimizerSettings
from tests.texts import save_text_foundation
from tests.tiny import RecordingNetwork
from tests.tuning.clusters import Tuned, tune_cluster
from tests.tuning.passages import TextCase, fine_tune, lora_of, plain_loss, random_passages

# A gradient that is nothing but rounding would be blown up by a smaller epsilon.
SETTINGS = OptimizerSettings(learning_rate=1e-2, weight_decay=0.1, clip_norm=0.5, epsilon=1e-3)
ABOVE = Spec(prompts=0, head=False, lora_rank=2, first_block=1)


@pytest.fixture(scope="module", params=["llama", "qwen3_next"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_text_foundation(tmp_path_factory.mktemp(request.param), request.param)


def tune(case: TextCase, **settings: object) -> Tuned:
    batches = settings.pop("batches", random_passages(3, 5))
    return asyncio.run(tune_cluster(case, case.tunables, batches, SETTINGS, stages=case.stages(), **settings))


@pytest.mark.parametrize(
    ("labels", "cuts", "microbatches", "owners"),
    [("start", (1, 2), 1, 1), ("start", (2,), 3, 2), ("end", (1, 2), 2, 3)],
)
def test_local_steps_equal_fine_tuning_with_peft(
    folder: Path, labels: str, cuts: tuple[int, ...], microbatches: int, owners: int
) -> None:
    case = TextCase(folder, cuts, labels, owners=owners)
    tuned = tune(case, num_microbatches=microbatches)
    plain = case.plain()
    losses = fine_tune(plain, random_passages(3, 5), rate=1e-2, decay=0.1, clip_norm=0.5, epsilon=1e-3)
    truth = lora_of(plain)
    assert tuned.tunables.keys() == truth.keys()
    for name, tensor in tuned.tunables.items():
        torch.testing.assert_close(tensor, truth[name].detach(), rtol=1e-4, atol=1e-5)
        assert not torch.equal(tensor, case.tunables[name])
    assert tuned.results["device-0"].loss == pytest.approx(sum(losses) / 3, rel=1e-5)


def test_shares_of_microbatches_of_unequal_lengths_sum_to_the_batchs_mean(folder: Path) -> None:
    case = TextCase(folder, cuts=())
    (stage,) = case.stages().values()
    stage.begin(case.tunables)
    (batch,), (segment,) = random_passages(1, 5), case.held_by("device-0")
    counted = int((batch.labels >= 0).sum())
    parts = [part.trimmed() for part in batch.split(3)]
    assert len({part.tokens.shape[1] for part in parts}) > 1
    shares = [
        stage.loss(MicrobatchKey(0, index, 0), segment, part.tokens, part.labels, counted, input_grads=False)
        for index, part in enumerate(parts)
    ]
    assert sum(shares) == pytest.approx(plain_loss(case.plain(), batch).item(), rel=1e-6)


def test_what_the_frozen_blocks_make_of_a_passage_is_sent_once_and_changes_nothing(
    folder: Path, tmp_path: Path
) -> None:
    case = TextCase(folder, spec=ABOVE)
    batches = [replace(batch, keys=prefix_keys(batch.tokens, "v")) for batch in random_passages(2, 4)]
    runs = []
    for kept in (False, True):
        network, caches = RecordingNetwork(), None
        if kept:
            row = activation_bytes(case.routes[0].shape, 1)
            caches = {n: PrefixCache(tmp_path / n, row, 100 * row, 0) for n in case.placement.node_ids}
        tuned = tune(case, batches=batches + batches, network=network, caches=caches)
        sent = sum(s.payload_bytes for s in network.sent if s.method == "forward" and s.sender_id == "device-0")
        runs.append((tuned, sent))
    (plain, all_bytes), (with_cache, fewer_bytes) = runs
    # Without keys passages are trimmed, so that a product is of another size and rounds in another way.
    for name, tensor in plain.tunables.items():
        torch.testing.assert_close(with_cache.tunables[name], tensor, rtol=1e-4, atol=1e-5)
    assert fewer_bytes < 0.7 * all_bytes
