"""The example that the README shows is run as it stands, on a small federation."""

import asyncio
import importlib.util
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.fixture
def example():
    spec = importlib.util.spec_from_file_location("tune", ROOT / "examples" / "tune.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_example_tunes_saves_and_loads(example, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    small = ["topology.clusters_per_edge=1", "topology.devices_per_cluster=2", "tuning.rounds=1", "data.train=60"]
    quick = ["pretraining.steps=3", "evaluation.requests=1", "evaluation.inversion=false"]
    asyncio.run(example.main([*small, *quick], tmp_path / "run"))
    printed = capsys.readouterr().out
    assert "round 1 cloud: accuracy" in printed
    assert "torch.Size([1, 10])" in printed
    assert (tmp_path / "run" / "report.html").stat().st_size > 10_000
