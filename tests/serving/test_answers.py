"""An answer that was given before is given again only where the same would be said."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from ecogen.config import Serving
from ecogen.models.mixed_lora import open_adapter
from ecogen.serving.answers import Answers
from ecogen.serving.desk import Generate
from ecogen.serving.generation import GenerationRequest
from ecogen.serving.sampling import Chosen, Sampling
from tests.models.decoders import save_decoder
from tests.models.test_mixed_lora import save_adapter
from tests.serving.adapters import asked, wanted
from tests.serving.federations import request, serving, tiny_recipe, whole_answer

ASKED = Generate("a", GenerationRequest("m", (1, 2), Sampling(temperature=0.5, seed=3), 4, frozenset({9})), "v1")
SAID = [Chosen(5, -0.1), Chosen(6, -0.2)]


def changed(**changes: Any) -> Generate:
    own = {name: changes.pop(name) for name in ("request_id", "adapter_id", "given") if name in changes}
    sampling = {name: value for name, value in changes.items() if hasattr(ASKED.request.sampling, name)}
    others = {name: value for name, value in changes.items() if name not in sampling}
    asked = dataclasses.replace(ASKED.request, sampling=dataclasses.replace(ASKED.request.sampling, **sampling))
    fields = {name: getattr(ASKED, name) for name in ("request_id", "adapter_id", "given")}
    return Generate(**fields | own | {"request": dataclasses.replace(asked, **others)})


def test_the_same_again() -> None:
    answers = Answers(2)
    answers.keep(ASKED, SAID)
    assert answers.find(changed(request_id="b")) == tuple(SAID)


@pytest.mark.parametrize(
    "changes",
    [
        {"prompt": (1, 3)},
        {"max_new": 5},
        {"ends": frozenset()},
        {"tenant": "anna"},
        {"adapter_id": "v2"},
        {"seed": 4},
        {"temperature": 0.6},
        {"top_p": 0.5},
        {"logit_bias": ((1, 2.0),)},
        {"num_top": 2},
        {"given": (5,)},
        {"seed": None},
    ],
    ids=str,
)
def test_something_else(changes: dict[str, Any]) -> None:
    answers = Answers(2)
    answers.keep(ASKED, SAID)
    assert answers.find(changed(**changes)) is None


def test_what_is_drawn_by_chance_is_drawn_anew() -> None:
    answers = Answers(2)
    answers.keep(changed(seed=None), SAID)
    assert answers.find(changed(seed=None)) is None
    answers.keep(changed(temperature=0, seed=1), SAID)
    assert answers.find(changed(temperature=0, seed=2)) == tuple(SAID)


def test_room_is_bounded() -> None:
    answers = Answers(2)
    for seed in (1, 2):
        answers.keep(changed(seed=seed), SAID)
    answers.find(changed(seed=1))
    answers.keep(changed(seed=3), SAID)
    assert [answers.find(changed(seed=seed)) is not None for seed in (1, 2, 3)] == [True, False, True]
    off = Answers(0)
    off.keep(ASKED, SAID)
    assert off.find(ASKED) is None


async def test_at_an_edge(tmp_path: Path) -> None:
    """The second time costs no computing; a replaced adapter never answers with what its predecessor said."""
    model = tmp_path / "tiny"
    save_decoder("llama", model)
    adapters = [save_adapter(model, tmp_path / f"adapter-{seed}", seed) for seed in (0, 1)]
    recipe = tiny_recipe(model, devices=1, serving=Serving(slots=1, max_tokens=64, answers=8))
    async with serving(recipe, tmp_path) as (gateway, _):
        first, again = [await whole_answer(gateway, [5, 6, 7], 12) for _ in range(2)]
        assert first[0] == again[0]
        assert first[1].node_ids
        assert first[1].bill.energy_j.mid > 0
        assert not again[1].node_ids
        assert again[1].bill.energy_j.mid == 0
        stopped = gateway.generate(request(gateway, [8, 9], 12))
        one = await anext(stopped)
        while isinstance(one, Chosen):
            one = await stopped.asend(True)
        assert len((await whole_answer(gateway, [8, 9], 12))[0]) == 12, "what was stopped early is not kept"
        for adapter in adapters:
            await gateway.versions.put_adapter("mine", open_adapter(adapter))
            for _ in range(2):
                assert await asked(gateway, "mine", [5, 6, 7], 12) == wanted(model, adapter, [5, 6, 7], 12)
