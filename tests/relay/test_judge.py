from __future__ import annotations

import torch

from ecogen.config import Data
from ecogen.relay.judge import train_judge
from ecogen.tuning.datasets import open_data, resized


def test_a_judge_reads_digits_it_has_not_seen() -> None:
    pool = open_data(Data(name="digits")).own
    images = resized(pool.images.float()[:, None] / pool.white, 28).clamp(0, 1)
    labels = torch.as_tensor(pool.labels).long()
    seen = torch.arange(len(images)) % 3 > 0
    judge = train_judge(images[seen], labels[seen], 10, seed=0, steps=150)
    assert (judge.labels(images[~seen]) == labels[~seen]).double().mean() > 0.95
    assert (judge.labels(torch.rand(100, 1, 28, 28)) == labels[:100]).double().mean() < 0.4
    among_others = judge.features(images[:300])[:5]
    assert torch.allclose(among_others, judge.features(images[:5]), atol=1e-4), "each image by itself"
    again = train_judge(images[seen], labels[seen], 10, seed=0, steps=150)
    assert torch.equal(judge.features(images[:5]), again.features(images[:5]))
