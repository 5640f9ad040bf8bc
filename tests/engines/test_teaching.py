"""Students of a finished run, as a person asks for them: what is saved, what it can be used for, what goes wrong."""

from __future__ import annotations

import asyncio
import errno
import json
import os
import shutil
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from rich.console import Console
from safetensors import SafetensorError
from transformers import LlamaForCausalLM, ViTForImageClassification

from ecogen import config as recipes
from ecogen.engines import session, teaching
from ecogen.engines.run_folder import locked, write_recipe
from ecogen.errors import DataError
from ecogen.models.pair_model import PairModel
from ecogen.relay import assessment
from ecogen.relay.course import SAMPLES, SETTINGS, draw_pairs
from ecogen.relay.examination import Examination, Scores
from ecogen.relay.judge import train_judge
from ecogen.relay.students import teach_decoder
from ecogen.tuning.captions import digit_caption
from tests.command import Ran, call
from tests.pictures import make_sure, pair_recipe, rehearse_little, save_pair_foundation

DIGITS = sorted(digit_caption(digit) for digit in range(10))
PHASES = ["drawing", "reading", "choosing", "writing", "learning", "judging"]
LITTLE = ("--samples", 20, "--steps", 3)
UNTIL_SAVED = ("facts.json", "summary.json", "report.html", "tunables.safetensors", "adapter", "backbone")
"""What a run folder lacks before its run has ended; the nodes' own tunables too, which do not matter here."""


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
    assert (figures["student"], figures["num_drawings"], figures["steps"]) == ("decoder", 20, 3)
    assert figures["scores"].keys() == {"student", "teacher"}
    assert figures["scores"]["student"]["num_tests"] == 40
    assert figures["scores"]["student"]["num_drawn"] == 400
    assert 0 < figures["energy_j"]["low"] < figures["energy_j"]["mid"] < figures["energy_j"]["high"]
    student = LlamaForCausalLM.from_pretrained(out)
    assert (
        sum(one.numel() for one in student.parameters())
        == figures["num_parameters"]
        < figures["num_teacher_parameters"]
    )
    drawn: Ran = ecogen("generate", out, DIGITS[0], "--n", 2, "--seed", 1, "--out", tmp_path / "drawn.png", "--json")
    assert drawn.code == 0, drawn.err
    assert drawn.figures["model"] == "student"
    assert (tmp_path / "drawn.png").read_bytes().startswith(b"\x89PNG")
    assert PairModel.of(student.eval(), out).describe(torch.zeros(1, 1, 8, 8))


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["a one", "--out", "one.jpg"], "one.jpg is to be a PNG file; call it one.png"),
        (["a one", "--out", "one"], "one is to be a PNG file; call it one.png"),
        (["a one", "--out", "."], ". is to be a PNG file; call it drawn.png"),
        (["a one", "--out", ".."], ".. is to be a PNG file; call it ../drawn.png"),
        (["a one", "--edge", "edge-7"], "name one with --edge: edge-0, edge-1, not 'edge-7'"),
        ([" "], "the prompt is empty; say what to draw"),
        (["a one", "--seed", "99999999999999999999"], "less than or equal to 9223372036854775807"),
    ],
)
def test_what_is_not_drawn(arguments: list[str], told: str, run: Path, tmp_path: Path, ecogen: Any) -> None:
    ran: Ran = ecogen("generate", run, "--out", tmp_path / "drawn.png", *arguments)
    assert ran.code == 2
    assert told in " ".join(ran.err.split())
    assert not list(tmp_path.iterdir())


def test_one_picture_is_a_file_of_its_own_size(run: Path, tmp_path: Path, ecogen: Any) -> None:
    for number, size in ((1, (8, 8)), (2, (18, 8)), (4, (18, 18))):
        assert ecogen("generate", run, "a one", "--n", number, "--out", tmp_path / "drawn.png").code == 0
        assert Image.open(tmp_path / "drawn.png").size == size


def test_the_same_seed_gives_the_same_student_judged_or_not(run: Path, tmp_path: Path, ecogen: Any) -> None:
    for name, more in {"one": (), "same": ("--no-judge",), "other": ("--seed", 1, "--no-judge")}.items():
        ran: Ran = ecogen("teach", run, "--out", tmp_path / name, *LITTLE, *more)
        assert ran.code == 0, ran.err
        assert ("judging" in ran.err) == (name == "one")
    assert not json.loads((tmp_path / "same" / "student.json").read_text())["scores"]
    one, same, other = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("one", "same", "other"))
    assert one == same != other


def test_what_a_student_learns_from(run: Path, tmp_path: Path, ecogen: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []

    def drawn(*asked: Any) -> Any:
        seen.append(asked[1:4])
        return draw_pairs(*asked)

    def learnt(config: Any, passages: Any, settings: Any, on_step: Any) -> Any:
        seen.append((len(passages), settings.seed, settings.steps, torch.get_num_threads()))
        time.sleep(0.3)
        return teach_decoder(config, passages, settings, on_step)

    monkeypatch.setattr(teaching, "draw_pairs", drawn)
    monkeypatch.setattr(teaching, "teach_decoder", learnt)
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        ran: Ran = ecogen("teach", run, "--seed", 5, "--out", tmp_path / "student", *LITTLE, "--no-judge", "--json")
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(threads)
    assert ran.code == 0, ran.err
    assert seen == [(DIGITS, 20, 5), (20 * 5 * 2, 5, 3, 1)], "four moved views of each, both ways, on one thread"
    assert ran.figures["wall_s"] > 0.3, "learning is billed"


def test_scores_are_of_whom_they_are_said_to_be(
    run: Path, tmp_path: Path, ecogen: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def counted(_: object, model: PairModel, __: int) -> Scores:
        return Scores(None, teaching.num_parameters(model.model), 0, 1)

    monkeypatch.setattr(Examination, "generator", counted)
    figures = ecogen("teach", run, "--out", tmp_path / "student", *LITTLE, "--json").figures
    assert figures["scores"]["student"]["captions_right"] == figures["num_parameters"]
    assert figures["scores"]["teacher"]["captions_right"] == figures["num_teacher_parameters"]


def test_who_taught_is_written_down(run: Path, tmp_path: Path, ecogen: Any) -> None:
    told = []
    for name, more in {"cloud": (), "edge-0": ("--edge", "edge-0"), "edge-1": ("--edge", "edge-1")}.items():
        ran: Ran = ecogen("teach", run, "--out", tmp_path / name, *LITTLE, *more, "--no-judge", "--json")
        told.append(ran.figures["teacher"])
    assert [(one["run"], one["node_id"]) for one in told] == [
        ("tiny-pairs", one) for one in ("cloud", "edge-0", "edge-1")
    ]
    assert len({one["tunables"] for one in told}) == 3


def test_what_the_teacher_does_not_know_is_told_and_not_taught(
    run: Path, tmp_path: Path, ecogen: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    known = DIGITS[:2]
    kept = lambda asked, *_: [place for place, caption in enumerate(asked) if caption in known]  # noqa: E731
    monkeypatch.setattr("ecogen.relay.teacher.kept_places", kept)
    out = tmp_path / "student"
    ran: Ran = ecogen("teach", run, "--student", "classifier", "--out", out, *LITTLE, "--json")
    assert ran.code == 0, ran.err
    assert (ran.figures["captions"], ran.figures["unknown"]) == (known, DIGITS[2:])
    assert f"does not know them: {DIGITS[2]!r}" in ran.err
    assert [*ViTForImageClassification.from_pretrained(out).config.id2label.values()] == known
    tests = ran.figures["scores"]["student"]["num_tests"]
    assert 0 < tests < 40, "of what was taught"
    known.pop()
    ran = ecogen("teach", run, "--student", "classifier", "--out", tmp_path / "other", *LITTLE)
    assert ran.code == 2
    assert f"but {DIGITS[0]!r}, since the teacher does not know {DIGITS[1]!r}, {DIGITS[2]!r}" in ran.err


def test_a_classifier_names_what_one_edge_taught(run: Path, tmp_path: Path, ecogen: Any) -> None:
    out = tmp_path / "student"
    ran: Ran = ecogen("teach", run, "--student", "classifier", "--edge", "edge-1", "--out", out, *LITTLE)
    assert ran.code == 0, ran.err
    assert "a classifier of" in ran.out
    assert "Judged by real pairs" in ran.out
    student = ViTForImageClassification.from_pretrained(out)
    assert sorted(student.config.id2label.values()) == sorted(digit_caption(digit) for digit in range(5, 10))
    assert student(pixel_values=torch.zeros(1, 1, 8, 8)).logits.shape == (1, 5)
    served: Ran = ecogen("generate", out, "a one", "--out", tmp_path / "drawn.png")
    assert (served.code, "holds a classifier of images; only decoders are served and draw" in served.err) == (2, True)
    (out / "config.json").write_text("[]")
    served = ecogen("generate", out, "a one", "--out", tmp_path / "drawn.png")
    assert (served.code, "config.json cannot be read (it is no object but [])" in served.err) == (2, True)
    scores = json.loads((out / "student.json").read_text())["scores"]
    assert (scores["student"]["recognised"], scores["student"]["num_tests"]) == (None, 20), "only of what was taught"


def test_captions_that_nobody_tests_are_taught_and_not_judged(run: Path, tmp_path: Path, ecogen: Any) -> None:
    copied = Path(shutil.copytree(run, tmp_path / "run"))
    ran: Ran = ecogen("teach", copied, "--caption", "a seven", "--caption", "a seven", *LITTLE, "--json")
    assert ran.code == 0, ran.err
    assert ran.figures["folder"] == str(copied / "students" / "decoder")
    assert (ran.figures["captions"], ran.figures["scores"]) == (["a seven"], {})
    assert "not judged, since no test pair of the run has these captions" in ran.err


@pytest.mark.parametrize("out", ["empty", "mine.txt", ".", "link"])
def test_what_is_there_is_not_replaced(
    run: Path, tmp_path: Path, ecogen: Any, monkeypatch: pytest.MonkeyPatch, out: str
) -> None:
    """A shell may be in an empty folder, and a link say where another disk is."""
    (tmp_path / "mine.txt").write_text("mine")
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    monkeypatch.chdir(tmp_path / "empty" if out == "." else tmp_path)
    ran: Ran = ecogen("teach", run, "--out", out, *LITTLE)
    assert (ran.code, f"{out} exists already; give another --out, or remove it" in ran.err) == (2, True)
    assert "drawing" not in ran.err
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["empty", "link", "mine.txt"]


@pytest.mark.parametrize("step", ["ecogen.engines.teaching.teach_decoder", "ecogen.engines.teaching.write_text_files"])
def test_an_interrupted_lesson_leaves_nothing(
    run: Path, tmp_path: Path, ecogen: Any, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    def broken_off(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(step, broken_off)
    ran: Ran = ecogen("teach", run, "--out", tmp_path / "student", *LITTLE)
    assert ran.code == 130
    assert "nothing was written" in ran.err
    assert not list(tmp_path.iterdir())


def test_a_full_disk_leaves_nothing(run: Path, tmp_path: Path, ecogen: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    def unsaved(*_: object) -> None:
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    for owner, name, broken in ((os, "replace", full), (LlamaForCausalLM, "save_pretrained", unsaved)):
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, broken)
            ran: Ran = ecogen("teach", run, "--out", tmp_path / "student", *LITTLE)
        assert (ran.code, "No space left on device" in ran.err) == (2, True)
        assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("problem", "code", "told"),
    [
        (KeyboardInterrupt(), 130, "student, not judged"),
        (DataError("the judge is away"), 2, "the judge is away; the student is in "),
    ],
)
def test_a_student_that_cannot_be_judged_is_kept(
    run: Path,
    tmp_path: Path,
    ecogen: Any,
    monkeypatch: pytest.MonkeyPatch,
    problem: BaseException,
    code: int,
    told: str,
) -> None:
    def away(*_: object) -> None:
        raise problem

    monkeypatch.setattr(Examination, "generator", away)
    ran: Ran = ecogen("teach", run, "--out", tmp_path / "student", *LITTLE)
    assert ran.code == code
    assert told in ran.err
    assert not json.loads((tmp_path / "student" / "student.json").read_text())["scores"]
    assert LlamaForCausalLM.from_pretrained(tmp_path / "student")


def test_who_comes_second_says_so(run: Path, tmp_path: Path, ecogen: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def overtaken(config: Any, passages: Any, settings: Any, on_step: Any) -> Any:
        (tmp_path / "student").mkdir()
        (tmp_path / "student" / "config.json").write_text("theirs")
        return teach_decoder(config, passages, settings, on_step)

    monkeypatch.setattr(teaching, "teach_decoder", overtaken)
    ran: Ran = ecogen("teach", run, "--out", tmp_path / "student", *LITTLE)
    assert ran.code == 2
    assert "Directory not empty; choose another folder" in ran.err
    assert (tmp_path / "student" / "config.json").read_text() == "theirs"
    assert [path.name for path in tmp_path.iterdir()] == ["student"]


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--edge", "edge-7"], "there is no 'edge-7' in "),
        (["--edge", "edge-7", "--caption", "a one"], "its edges are edge-0, edge-1"),
        (["--student", "classifier", "--caption", "a one"], "there is but 'a one'; give two or more"),
        (["--caption", "a handwritten " * 40], "tokens; give one of 1 to "),
        (["--caption", ""], "the caption '' has 0 tokens"),
        (["--student", "painter"], "painter"),
        (["--samples", "0"], "greater than or equal to 1"),
        (["--seed", "99999999999999999999"], "less than or equal to 9223372036854775807"),
        (["--out", "/proc/self/student"], "cannot write to /proc/self"),
        (["--out", "/dev/null/student"], "cannot make the folder /dev/null"),
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


def test_a_run_that_draws_nothing_is_refused(tmp_path: Path, ecogen: Any) -> None:
    (tmp_path / "run").mkdir()
    write_recipe(tmp_path / "run", recipes.load("digits"))
    ran: Ran = ecogen("teach", tmp_path / "run", *LITTLE)
    assert ran.code == 2
    assert "holds a model that draws no pictures; give a run of the recipe pairs" in ran.err


def test_a_folder_without_a_run_gets_no_folders(tmp_path: Path, ecogen: Any) -> None:
    ran: Ran = ecogen("teach", tmp_path, *LITTLE)
    assert (ran.code, "is no run folder" in ran.err) == (2, True)
    assert not list(tmp_path.iterdir())


def test_an_edge_without_a_model_of_its_own_is_no_teacher(run: Path, tmp_path: Path, ecogen: Any) -> None:
    copied = Path(shutil.copytree(run, tmp_path / "run"))
    shutil.rmtree(copied / "edges")
    ran: Ran = ecogen("teach", copied, "--edge", "edge-0", *LITTLE)
    assert (ran.code, f"{copied} has one model for all edges; leave --edge out" in ran.err) == (2, True)


@pytest.mark.parametrize("verb", ["teach", "generate", "serve", "report"])
def test_a_run_that_has_not_finished_says_so(run: Path, tmp_path: Path, ecogen: Any, verb: str) -> None:
    unfinished = tmp_path / "run"
    shutil.copytree(run, unfinished, ignore=shutil.ignore_patterns(*UNTIL_SAVED))
    asked = (verb, unfinished, *(["a one"] if verb == "generate" else []))
    ran: Ran = ecogen(*asked)
    assert (ran.code, f"holds a run that has not finished; go on with it: `ecogen run {unfinished}" in ran.err) == (
        2,
        True,
    )
    with locked(unfinished):
        ran = ecogen(*asked)
    assert (ran.code, f"{unfinished} belongs to a run that is going on; wait for its end" in ran.err) == (2, True)


def test_a_run_whose_cloud_was_taught_nothing_asks_for_captions(run: Path, tmp_path: Path, ecogen: Any) -> None:
    copied = Path(shutil.copytree(run, tmp_path / "run"))
    assert ecogen("rollback", copied, "--node", "cloud", "--to", 0).code == 0
    ran: Ran = ecogen("teach", copied, *LITTLE)
    assert ran.code == 2
    assert "does not say what its cloud has learnt from any edge (nothing after a rollback)" in ran.err


def test_the_help_tells_what_is_done_unless_other_is_asked_for(ecogen: Any) -> None:
    shown = " ".join(ecogen("teach", "--help").out.split())
    assert f"[default: ({SAMPLES})" in shown
    assert f"({SETTINGS['decoder'].steps}; of a classifier {SETTINGS['classifier'].steps})" in shown
