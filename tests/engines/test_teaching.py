"""Students of a finished run, as a person asks for them: what is saved, what it can be used for, what goes wrong."""

from __future__ import annotations

import asyncio
import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from transformers import LlamaForCausalLM, ViTForImageClassification

from ecogen.engines import session, teaching
from ecogen.models.pair_model import PairModel
from ecogen.relay import assessment
from ecogen.relay.judge import train_judge
from ecogen.tuning.captions import digit_caption
from tests.command import Ran, call
from tests.pictures import make_sure, pair_recipe, rehearse_little, save_pair_foundation

DIGITS = sorted(digit_caption(digit) for digit in range(10))
PHASES = ["drawing", "writing", "learning", "judging"]
LITTLE = ("--samples", 20, "--steps", 3)


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    make_sure(monkeypatch)
    monkeypatch.setattr(assessment, "train_judge", partial(train_judge, steps=5))


@pytest.fixture
def ecogen(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Any:
    return lambda *arguments: call(arguments, capsys, monkeypatch)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One round and one exchange; nobody writes there."""
    foundation, folder = save_pair_foundation(tmp_path_factory.mktemp("model")), tmp_path_factory.mktemp("runs") / "run"
    spec = {"every": 1, "samples": 20, "steps": 4, "learning_rate": 2e-2, "tolerance": 100.0}
    with pytest.MonkeyPatch.context() as patch:
        make_sure(patch)
        rehearse_little(patch)
        patch.setattr(assessment, "train_judge", partial(train_judge, steps=5))
        screen = Console(quiet=True)
        recipe = pair_recipe(foundation, relay=spec, data={"validation": 30})
        asyncio.run(session.run(recipe, folder, resume=False, screen=screen))
    return folder


def test_a_decoder_is_saved_whole_and_draws_like_any_model(run: Path, tmp_path: Path, ecogen: Any) -> None:
    out = tmp_path / "student"
    ran: Ran = ecogen("teach", run, "--out", out, *LITTLE, "--json")
    assert ran.code == 0, ran.err
    assert [line for line in ran.err.splitlines() if line in PHASES] == PHASES
    figures = ran.figures
    assert figures == {"folder": str(out), **json.loads((out / "student.json").read_text())}
    assert figures["captions"] == DIGITS, "all that edges have taught the cloud"
    assert (figures["student"], figures["drawings"], figures["steps"]) == ("decoder", 20, 3)
    assert figures["scores"].keys() == {"student", "teacher"}
    assert figures["scores"]["student"]["num_tests"] == 40
    assert figures["scores"]["student"]["num_drawn"] == 400
    assert 0 < figures["energy_j"]["low"] < figures["energy_j"]["mid"] < figures["energy_j"]["high"]
    student = LlamaForCausalLM.from_pretrained(out)
    assert sum(one.numel() for one in student.parameters()) == figures["parameters"] < figures["teacher_parameters"]
    drawn: Ran = ecogen("generate", out, DIGITS[0], "--n", 2, "--seed", 1, "--out", tmp_path / "drawn.png", "--json")
    assert drawn.code == 0, drawn.err
    assert drawn.figures["model"] == "student"
    assert (tmp_path / "drawn.png").read_bytes().startswith(b"\x89PNG")
    assert PairModel.of(student.eval(), out).describe(torch.zeros(1, 1, 8, 8))


def test_the_same_seed_gives_the_same_student_judged_or_not(run: Path, tmp_path: Path, ecogen: Any) -> None:
    for name, more in {"one": (), "same": ("--no-judge",), "other": ("--seed", 1, "--no-judge")}.items():
        assert ecogen("teach", run, "--out", tmp_path / name, *LITTLE, *more).code == 0
    assert not json.loads((tmp_path / "same" / "student.json").read_text())["scores"]
    one, same, other = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("one", "same", "other"))
    assert one == same != other


def test_a_classifier_names_what_one_edge_taught(run: Path, tmp_path: Path, ecogen: Any) -> None:
    out = tmp_path / "student"
    ran: Ran = ecogen("teach", run, "--student", "classifier", "--edge", "edge-1", "--out", out, *LITTLE)
    assert ran.code == 0, ran.err
    assert "a classifier of" in ran.out
    assert "Judged by real pairs" in ran.out
    student = ViTForImageClassification.from_pretrained(out)
    assert sorted(student.config.id2label.values()) == sorted(digit_caption(digit) for digit in range(5, 10))
    assert student(pixel_values=torch.zeros(1, 1, 8, 8)).logits.shape == (1, 5)
    scores = json.loads((out / "student.json").read_text())["scores"]
    assert (scores["student"]["recognised"], scores["student"]["num_tests"]) == (None, 20), "only of what was taught"


def test_captions_that_nobody_tests_are_taught_and_not_judged(run: Path, ecogen: Any) -> None:
    ran: Ran = ecogen("teach", run, "--caption", "a seven", *LITTLE, "--json")
    assert ran.code == 0, ran.err
    assert ran.figures["folder"] == str(run / "students" / "decoder")
    assert (ran.figures["captions"], ran.figures["scores"]) == (["a seven"], {})


def test_what_is_there_is_not_written_over(run: Path, tmp_path: Path, ecogen: Any) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    ran: Ran = ecogen("teach", run, "--out", tmp_path, *LITTLE)
    assert ran.code == 2
    assert f"{tmp_path} exists already; give another --out, or remove it" in ran.err
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_an_interrupted_lesson_leaves_nothing(
    run: Path, tmp_path: Path, ecogen: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken_off(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(teaching, "teach_decoder", broken_off)
    ran: Ran = ecogen("teach", run, "--out", tmp_path / "student", *LITTLE)
    assert ran.code == 130
    assert "nothing was written" in ran.err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--edge", "edge-7"], "does not say what its cloud has learnt from edge-7; say what to teach with --caption"),
        (["--edge", "edge-7", "--caption", "a one"], "name one: edge-0, edge-1, not 'edge-7'"),
        (["--caption", "a handwritten " * 40], "tokens; give one of 1 to "),
        (["--caption", ""], "the caption '' has 0 tokens"),
        (["--student", "painter"], "painter"),
        (["--samples", "0"], "greater than or equal to 1"),
    ],
)
def test_what_cannot_be_taught_is_told(arguments: list[str], told: str, run: Path, tmp_path: Path, ecogen: Any) -> None:
    ran: Ran = ecogen("teach", run, "--out", tmp_path / "student", *LITTLE, *arguments)
    assert ran.code == 2
    assert told in " ".join(ran.err.split())
    assert not (tmp_path / "student").exists()


def test_a_teacher_that_reads_nothing_of_what_it_draws_teaches_nothing(
    run: Path, tmp_path: Path, ecogen: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ecogen.relay.teacher.kept_places", lambda *_: [])
    ran: Ran = ecogen("teach", run, "--out", tmp_path / "student", *LITTLE)
    assert ran.code == 2
    assert "the teacher knows none of the captions" in ran.err


def test_a_folder_that_is_no_run_of_pairs_is_refused(tmp_path: Path, ecogen: Any) -> None:
    ran: Ran = ecogen("teach", tmp_path / "nothing", *LITTLE)
    assert ran.code == 2
    assert "nothing" in ran.err
