"""Students of a run's generator: smaller models, made anew, that learn from what it draws and nothing else.

A student's folder is as save_pretrained writes it; student.json there says what it learnt, how well, and what it took.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from torch import nn
from transformers import PreTrainedModel, ViTForImageClassification

from ecogen import config as recipes
from ecogen.accounting.bill import Bill
from ecogen.accounting.constants import Constants
from ecogen.accounting.energy import bill
from ecogen.engines.run_folder import NODES, load_recipe
from ecogen.errors import CheckpointError, RunError, StorageError
from ecogen.metering.meter import CpuMeter
from ecogen.models.adapters import BACKBONE, load_tuned
from ecogen.models.folder import read_text_files, write_text_files
from ecogen.models.pair_model import PairModel
from ecogen.records import Usage
from ecogen.relay import versions
from ecogen.relay.cloud_state import RelayState
from ecogen.relay.course import (
    LESSONS,
    OF_DRAWINGS,
    SAMPLES,
    Kind,
    draw_pairs,
    small_classifier,
    small_decoder,
    taught_classifier,
    with_views,
)
from ecogen.relay.examination import Examination, Scores
from ecogen.relay.students import teach_decoder
from ecogen.storage import make_folder, write_atomically
from ecogen.tuning.pairs import Pairs, PairWriter

STUDENT = "student.json"

OnStep = Callable[[str, int, int, str], None]
"""Told the phase, how far it is, of how much, and a word on it."""


@dataclass(frozen=True)
class Course:
    """What is asked for.

    Attributes:
        captions: that are taught; none for all that edges, or this edge, have taught the cloud.
        edge: whose model teaches; None for the cloud's.
        samples, steps: None for as many as benchmarks/relay_students.py has.
        is_judged: with the real test pairs of the run's recipe.
    """

    kind: Kind
    captions: Sequence[str]
    samples: int | None = None
    edge: str | None = None
    steps: int | None = None
    seed: int = 0
    is_judged: bool = True


@dataclass(frozen=True)
class Graduate:
    """A student that has learnt.

    Attributes:
        drawings: that it learnt from.
        scores: of `student` and `teacher`; empty where it was not judged.
        usage, bill: of teaching, without what judging took.
    """

    folder: Path
    course: Course
    parameters: int
    teacher_parameters: int
    drawings: int
    steps: int
    scores: Mapping[str, Scores]
    usage: Usage
    bill: Bill

    def table(self) -> dict[str, Any]:
        """As plain values, without the folder."""
        return {
            "student": self.course.kind,
            "edge": self.course.edge,
            "captions": list(self.course.captions),
            "seed": self.course.seed,
            "parameters": self.parameters,
            "teacher_parameters": self.teacher_parameters,
            "drawings": self.drawings,
            "steps": self.steps,
            "scores": {name: asdict(scores) for name, scores in self.scores.items()},
            "wall_s": self.usage.wall_s,
            "cpu_s": self.usage.cpu_s,
            "energy_j": asdict(self.bill.energy_j),
            "emissions_g": asdict(self.bill.emissions_g),
            "method": "joules and grams modelled: measured CPU time x device watts of the teaching node",
        }


def teach_student(folder: Path, out: Path, course: Course, on_step: OnStep) -> Graduate:
    """Have a run's generator teach a student, and save it.

    Raises:
        CheckpointError: if the run has no generator, or no such edge.
        RunError: if the folder is no run, or nobody taught its cloud anything and no caption is given.
        DataError: if a caption is too long, the teacher knows none of them, or the pairs to judge with are not there.
        StorageError: if there is something at `out` already.
    """
    check_free(out)
    recipe = load_recipe(folder)
    if not recipe.data.is_pairs:
        raise CheckpointError(f"{folder} holds a model that draws no pictures; give a run of the recipe pairs")
    if not course.captions:
        course = replace(course, captions=captions_taught(folder, course.edge))
    teacher = PairModel.of(load_tuned(folder, edge=course.edge), folder / BACKBONE)
    writer = PairWriter(teacher.tokenizer, teacher.images, recipe.model.context_length)
    writer.check_room(course.captions)
    examination = Examination.of(recipe, course.captions) if course.is_judged else None
    topology = recipes.build_topology(recipe.topology)
    node = topology.nodes[course.edge or topology.cloud_id]
    meter = CpuMeter(node.node_id)
    pairs, student = _taught(teacher, writer, course, on_step)
    usage = meter.take("relay")
    on_step("judging", 0, 1, "")
    graduate = Graduate(
        folder=out,
        course=course,
        parameters=num_parameters(student),
        teacher_parameters=num_parameters(teacher.model),
        drawings=len(pairs),
        steps=_lesson(course).steps,
        scores={} if examination is None else _scores(examination, student, teacher, course.seed),
        usage=usage,
        bill=bill(usage, (), node, topology.sites[node.site_id], Constants()),
    )
    _save(graduate, student, folder / BACKBONE)
    return graduate


def captions_taught(folder: Path, edge: str | None) -> list[str]:
    """What the cloud of a run has learnt from all edges, or from one.

    Raises:
        RunError: if that is nothing, or the cloud's disk is not here.
    """
    path = folder / NODES / "cloud" / versions.FOLDER / "state.safetensors"
    taught = RelayState.load(path).taught if path.exists() else {}
    found = {said for name, own in taught.items() if edge in (None, name) for said in own.samples.captions}
    if not found:
        raise RunError(
            f"{folder} does not say what its cloud has learnt from {edge or 'any edge'}; say what to teach with "
            '--caption, for example --caption "a handwritten seven"'
        )
    return sorted(found)


def check_free(out: Path) -> None:
    """See that nothing is overwritten.

    Raises:
        StorageError: if there is something.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise StorageError(f"{out} exists already; give another --out, or remove it")


def num_parameters(model: nn.Module) -> int:
    """Of a model; shared ones once."""
    return sum(parameter.numel() for parameter in model.parameters())


def _lesson(course: Course) -> recipes.Pretraining:
    own = LESSONS[course.kind]
    return replace(own, seed=course.seed, steps=own.steps if course.steps is None else course.steps)


def _taught(teacher: PairModel, writer: PairWriter, course: Course, on_step: OnStep) -> tuple[Pairs, PreTrainedModel]:
    """The drawings, and the student that has learnt from them."""

    def on_drawn(done: int, total: int) -> None:
        on_step("drawing", done, total, "pictures")

    def on_learnt(_: str, step: int, total: int, loss: float) -> None:
        on_step("learning", step, total, f"loss {loss:.3f}")

    pairs = draw_pairs(teacher, course.captions, course.samples or SAMPLES, course.seed, on_drawn)
    lesson = _lesson(course)
    if course.kind == "classifier":
        config = small_classifier(teacher.images.config, sorted(set(pairs.captions)))
        return pairs, taught_classifier(config, pairs, lesson, on_learnt)
    on_step("writing", 0, 1, "drawings in codes")
    passages = writer.both(with_views(pairs, OF_DRAWINGS, course.seed))
    return pairs, teach_decoder(small_decoder(teacher.model.config), passages, lesson, on_learnt).eval()


def _scores(examination: Examination, student: PreTrainedModel, teacher: PairModel, seed: int) -> dict[str, Scores]:
    """Of both; none where no test pair shows what was taught."""
    if not len(examination.tests):
        return {}
    if isinstance(student, ViTForImageClassification):
        own = examination.classifier(student)
    else:
        own = examination.generator(PairModel(student, teacher.tokenizer, teacher.images), seed)
    return {"student": own, "teacher": examination.generator(teacher, seed)}


def _save(graduate: Graduate, student: PreTrainedModel, teacher: Path) -> None:
    """Put the whole folder in place in one step."""
    make_folder(graduate.folder.parent)
    with tempfile.TemporaryDirectory(dir=graduate.folder.parent, prefix=".student-") as temporary:
        folder = Path(temporary) / "student"
        student.save_pretrained(folder)
        if graduate.course.kind == "decoder":
            write_text_files(folder, read_text_files(teacher))
        write_atomically(folder / STUDENT, json.dumps(graduate.table(), indent=1))
        os.replace(folder, graduate.folder)
