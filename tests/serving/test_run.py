"""A run that tuned a language model is served under its name, and says what plain PEFT says."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from peft import PeftModel
from transformers import AutoModelForCausalLM

from ecogen.engines.served import Served, find_served, serving_recipe
from ecogen.engines.serving import launch_serving
from ecogen.errors import CheckpointError
from ecogen.models.mixed_lora import open_adapter
from ecogen.serving.generation import GenerationRequest
from ecogen.serving.openai.text import load_text
from ecogen.serving.sampling import Chosen
from tests.serving.federations import GREEDY, alone
from tests.test_cli_text import settings


def test_what_was_tuned_is_served(ecogen: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    run = tmp_path / "run"
    ran = ecogen("run", "text", "--out", run, *settings(model__context_length=64))
    assert ran.code == 0, ran.err
    served = find_served(run)
    assert (served.name, list(served.adapters)) == ("text/backbone", ["text"])
    prompt = load_text(served.folder).encode("The statement")
    said = asyncio.run(answers(served, prompt))
    backbone = AutoModelForCausalLM.from_pretrained(run / "backbone").eval()
    assert said["text/backbone"] == alone(backbone, prompt, 20)
    assert said["text"] == alone(PeftModel.from_pretrained(backbone, run / "adapter").eval(), prompt, 20)


async def answers(served: Served, prompt: tuple[int, ...]) -> dict[str, list[int]]:
    """Of the backbone and of what was tuned."""
    said = {}
    async with launch_serving(serving_recipe(served.folder), name=served.name) as gateway:
        await gateway.versions.put_adapter("text", open_adapter(served.adapters["text"]))
        for name in ("text/backbone", "text"):
            asked = gateway.generate(GenerationRequest(name, prompt, GREEDY, 20))
            said[name] = [one.token async for one in asked if isinstance(one, Chosen)]
    return said


def test_a_run_of_pictures_is_none(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="holds no model: give a folder that save_pretrained wrote"):
        find_served(tmp_path)
