"""A tiny model, and adapters of it."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.models.decoders import save_decoder
from tests.models.test_mixed_lora import save_adapter
from tests.serving.adapters import NAMES


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "tiny"
    save_decoder("llama", folder)
    return folder


@pytest.fixture(scope="module")
def adapters(model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("adapters")
    return {name: save_adapter(model, folder / name, seed) for seed, name in enumerate(NAMES)}
