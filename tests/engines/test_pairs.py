"""A federation that tunes a text-image generator: each edge has a model of its own, which draws and is judged."""

from __future__ import annotations

import asyncio
import io
import json
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import PreTrainedModel

from ecogen.engines.generating import generate
from ecogen.engines.saving import save_run
from ecogen.engines.served import find_served
from ecogen.engines.session import predict
from ecogen.errors import CheckpointError, RunError, ServingError
from ecogen.models.adapters import BACKBONE, load_tuned
from ecogen.models.checkpoint import open_foundation
from ecogen.models.pair_model import PairModel
from ecogen.models.pictures import png_of
from ecogen.relay import assessment
from ecogen.relay.judge import train_judge
from ecogen.serving.openai.text import load_text
from ecogen.serving.sampling import Sampling
from tests.models.decoders import save_decoder
from tests.pictures import SIZES, pair_recipe, save_pair_foundation
from tests.runs import finish, running

GREEDY = Sampling(temperature=0)


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run, in its own folder."""
    folder = tmp_path_factory.mktemp("runs") / "pairs"
    recipe = pair_recipe(save_pair_foundation(tmp_path_factory.mktemp("model")))

    async def tune() -> None:
        async with running(recipe, folder) as (federation, _):
            await finish(federation)
            await federation.save(folder)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(assessment, "train_judge", partial(train_judge, steps=20))
        asyncio.run(tune())
    return folder


def test_each_edge_has_a_model_and_is_judged(run_folder: Path) -> None:
    summary = json.loads((run_folder / "summary.json").read_text())
    for name in ("recognised", "copies", "caption_accuracy"):
        assert summary[name].keys() == {"edge-0", "edge-1"}
        assert all(0 <= share <= 1 for share in summary[name].values()), name
    assert summary["perplexity"]["edge-0"]["saved"] == pytest.approx(summary["perplexity"]["edge-0"]["tuned"], rel=1e-4)
    assert list(find_served(run_folder).adapters) == ["tiny-pairs/edge-0", "tiny-pairs/edge-1"]
    own = [dict(load_tuned(run_folder, edge=edge).named_parameters()) for edge in ("edge-0", "edge-1")]
    assert any(not torch.equal(tensor, own[1][name]) for name, tensor in own[0].items())
    with pytest.raises(CheckpointError, match="has a model for each edge; name one: edge-0, edge-1"):
        load_tuned(run_folder)


def test_the_report_shows_what_was_drawn(run_folder: Path) -> None:
    page = (run_folder / "report.html").read_text()
    assert "What the model of each edge draws and says" in page
    assert page.count('<img class="sheet" src="data:image/png;base64,iVBOR') == 4
    assert "a row for each of a handwritten four, a handwritten one" in page


async def test_a_generator_classifies_nothing(run_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "one.png").write_bytes(png_of(torch.zeros(1, 8, 8)))
    with pytest.raises(RunError, match="holds a generator, which classifies nothing; draw with `ecogen generate`, or"):
        await predict(run_folder, [tmp_path / "one.png"], "inproc")


def drawn_by_whole(model: PreTrainedModel, folder: Path, caption: str) -> list[int]:
    """The likeliest codes, one after the other, without any cache."""
    text = load_text(folder / BACKBONE)
    assert text.pictures is not None
    tokens = [*text.encode_caption(caption), text.pictures.tokens.begin]
    first, stop = text.pictures.tokens.within
    for _ in range(SIZES.num_codes):
        logits = model(torch.tensor([tokens])).logits[0, -1]
        tokens.append(first + int(logits[first:stop].argmax()))
    return tokens[-SIZES.num_codes :]


@pytest.mark.parametrize("edge", ["edge-0", "edge-1"])
async def test_a_chain_draws_what_the_whole_model_draws(edge: str, run_folder: Path) -> None:
    drawn = await generate(run_folder, "a handwritten two", 1, sampling=GREEDY, edge=edge, engine="inproc")
    with torch.no_grad():
        wanted = drawn_by_whole(load_tuned(run_folder, edge=edge), run_folder, "a handwritten two")
    assert drawn.tokens == [wanted]
    assert drawn.model == f"tiny-pairs/{edge}"
    assert drawn.bill.energy_j.mid > 0


async def test_a_sheet_of_pictures(run_folder: Path) -> None:
    ask = partial(generate, run_folder, "a handwritten two", 3, edge="edge-0", engine="inproc")
    drawn = await ask(sampling=Sampling(seed=1))
    sheet = Image.open(io.BytesIO(drawn.sheet))
    assert sheet.size == (2 * 8 + 2, 2 * 8 + 2), "three of 8 x 8 in two rows, with a gap"
    assert (await ask(sampling=Sampling(seed=1))).sheet == drawn.sheet
    assert (await ask(sampling=Sampling(seed=9))).tokens != drawn.tokens
    images = load_text(run_folder / BACKBONE).pictures
    assert images is not None
    own = np.asarray(Image.open(io.BytesIO(images.png(drawn.tokens[0]))))
    assert np.array_equal(np.asarray(sheet)[:8, :8], own)


async def test_who_is_asked(run_folder: Path, tmp_path: Path) -> None:
    ask = partial(generate, sampling=GREEDY, engine="inproc")
    with pytest.raises(CheckpointError, match="name one with --edge: edge-0, edge-1"):
        await ask(run_folder, "a handwritten two", 1, edge=None)
    with pytest.raises(CheckpointError, match="name one with --edge: edge-0, edge-1"):
        await ask(run_folder, "a handwritten two", 1, edge="edge-7")
    with pytest.raises(ServingError, match="are taken before a picture; shorten it"):
        await ask(run_folder, "a handwritten two " * 50, 1, edge="edge-0")
    save_decoder("llama", tmp_path / "text")
    (tmp_path / "text" / "tokenizer.json").write_bytes((run_folder / BACKBONE / "tokenizer.json").read_bytes())
    with pytest.raises(CheckpointError, match="draws no pictures"):
        await ask(tmp_path / "text", "a handwritten two", 1, edge=None)
    assert (await ask(run_folder / BACKBONE, "a handwritten two", 1, edge=None)).model == BACKBONE


async def test_an_average_for_all_edges_is_judged_at_each(
    run_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(assessment, "train_judge", partial(train_judge, steps=5))
    recipe = pair_recipe(run_folder / BACKBONE, tuning={"cloud_every": 1})
    async with running(recipe, tmp_path / "run") as (federation, _):
        left = await finish(federation)
        foundation = open_foundation(run_folder / BACKBONE)
        summary = save_run(tmp_path / "run", recipe, left.records, foundation, left.tunables, 1.0, "inproc")
    assert summary["recognised"] is not None
    assert summary["recognised"].keys() == {"edge-0", "edge-1"}
    assert list(find_served(tmp_path / "run").adapters) == ["tiny-pairs"]
    drawn = await generate(tmp_path / "run", "a handwritten two", 1, sampling=GREEDY, edge=None, engine="inproc")
    assert drawn.model == "tiny-pairs"
    with pytest.raises(CheckpointError, match="leave --edge out"):
        await generate(tmp_path / "run", "two", 1, sampling=GREEDY, edge="edge-0", engine="inproc")


def test_a_whole_model_draws_describes_and_invents(run_folder: Path) -> None:
    model = PairModel.of(load_tuned(run_folder, edge="edge-0"), run_folder / BACKBONE)
    generator = torch.Generator().manual_seed(0)
    drawn = model.draw(["a handwritten two", "a handwritten three"] * 70, generator)
    assert drawn.images.shape == (140, 1, 8, 8)
    assert (drawn.images.min() >= 0, drawn.images.max() <= 1) == (True, True)
    assert (drawn.log_likelihood < 0).all()
    said = model.describe(drawn.images[:3])
    assert said == [model.describe(image[None])[0] for image in drawn.images[:3]], "the same alone and among others"
    with torch.no_grad():
        likely = model._log_likelihood(drawn.codes, drawn.captions)
    assert torch.allclose(likely, drawn.log_likelihood, atol=1e-3), "token by token as all at once"
    invented = model.invent(5, generator)
    assert len(invented.captions) == len(invented.images) == 5
    assert all(invented.captions)
