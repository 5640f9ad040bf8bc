"""Students of a run's generator: smaller models, made anew, that learn from what it draws and nothing else.

A student's folder is as save_pretrained writes it; student.json there says what it learnt, how well, and what it took.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from torch import nn
from transformers import PreTrainedModel, ViTForImageClassification

from ecogen import config as recipes
from ecogen.accounting.bill import Bill
from ecogen.accounting.constants import Constants
from ecogen.accounting.energy import bill
from ecogen.engines.run_folder import NODES, check_ended, load_recipe
from ecogen.errors import CheckpointError, DataError, RunError, StorageError
from ecogen.metering.meter import CpuMeter
from ecogen.models.adapters import BACKBONE, load_tuned, tunables_file, tuned_folder
from ecogen.models.folder import read_text_files, write_text_files
from ecogen.models.pair_model import PairModel
from ecogen.records import Usage
from ecogen.relay import versions
from ecogen.relay.cloud_state import RelayState
from ecogen.relay.course import (
    OF_DRAWINGS,
    SAMPLES,
    SETTINGS,
    TEMPERATURE,
    Kind,
    draw_pairs,
    small_classifier,
    small_decoder,
    taught_classifier,
    write_pairs,
)
from ecogen.relay.examination import Examination, Scores, assessor_of
from ecogen.relay.students import teach_decoder
from ecogen.storage import make_folder, put_folder, write_atomically
from ecogen.topology import Node, Site, Topology
from ecogen.tuning.pairs import Pairs, PairWriter
from ecogen.tuning.parallel import on_one_thread

STUDENT = "student.json"

_UNFINISHED = ".student-"

OnDetail = Callable[[str, int, int, str], None]
"""Told what is done, how much of it, of how much, and a word on it."""


@dataclass(frozen=True)
class StudentSpec:
    """What is asked for.

    Attributes:
        captions: that are to be taught; none for all that edges, or this edge, have taught the cloud.
        edge: whose model teaches; None for the cloud's.
        samples, steps: None for what `relay.course` has.
        is_judged: with the real test pairs of the run's recipe.
    """

    kind: Kind
    captions: Sequence[str] = ()
    samples: int | None = None
    edge: str | None = None
    steps: int | None = None
    seed: int = 0
    is_judged: bool = True

    @property
    def num_samples(self) -> int:
        """Of drawings, at most."""
        return SAMPLES if self.samples is None else self.samples

    @property
    def settings(self) -> recipes.Pretraining:
        """How it learns."""
        own = SETTINGS[self.kind]
        return replace(own, seed=self.seed, steps=own.steps if self.steps is None else self.steps)


@dataclass(frozen=True)
class TaughtStudent:
    """A student that has learnt.

    Attributes:
        teacher: the run, the node and a fingerprint of its tunables.
        captions: that it was taught.
        unknown: that were asked for, and that the teacher does not know.
        num_drawings: that it learnt from.
        scores: of `student` and `teacher`; empty where it is not judged.
        usage, bill: of teaching, without what judging took.
    """

    folder: Path
    spec: StudentSpec
    teacher: Mapping[str, str]
    captions: Sequence[str]
    unknown: Sequence[str]
    num_parameters: int
    num_teacher_parameters: int
    num_drawings: int
    usage: Usage
    bill: Bill
    scores: Mapping[str, Scores]

    def table(self) -> dict[str, Any]:
        """As plain values, without the folder."""
        return {
            "student": self.spec.kind,
            "teacher": dict(self.teacher),
            "captions": list(self.captions),
            "unknown": list(self.unknown),
            "samples": self.spec.num_samples,
            "temperature": TEMPERATURE,
            "num_drawings": self.num_drawings,
            "steps": self.spec.settings.steps,
            "seed": self.spec.seed,
            "num_parameters": self.num_parameters,
            "num_teacher_parameters": self.num_teacher_parameters,
            "scores": {name: asdict(scores) for name, scores in self.scores.items()},
            "wall_s": self.usage.wall_s,
            "cpu_s": self.usage.cpu_s,
            "energy_j": asdict(self.bill.energy_j),
            "emissions_g": asdict(self.bill.emissions_g),
            "method": "joules and grams modelled: measured CPU time x device watts of the teaching node",
        }


def teach_student(folder: Path, out: Path, spec: StudentSpec, on_detail: OnDetail) -> TaughtStudent:
    """Have a run's generator teach a student, save it, and judge it.

    Raises:
        CheckpointError: if the run has no generator, or no such edge, or a file of it is damaged.
        RunError: if the folder is no run that has ended, or nobody taught its cloud anything and no caption is given.
        DataError: if a caption is too long, the teacher knows too few, or the pairs to judge with are not there.
        StorageError: if there is something at `out` already, or it cannot be written.
    """
    recipe = load_recipe(folder)
    topology = recipes.build_topology(recipe.topology)
    _check_teacher(folder, recipe, topology, spec.edge)
    make_room(out)
    asked = list(dict.fromkeys(spec.captions)) or captions_taught(folder, topology.cloud_id, spec.edge)
    teacher = _Teacher.of(folder, recipe, topology, spec.edge)
    teacher.writer.check_room(asked)
    assessor = assessor_of(recipe) if spec.is_judged else None
    taught, student = _taught(teacher, asked, spec, out, on_detail)
    _save(taught, student, folder / BACKBONE)
    examination = None if assessor is None else Examination.of(assessor, taught.captions)
    if examination is None:
        return taught
    on_detail("judging", 0, 1, "with real test pairs")
    try:
        taught = replace(taught, scores=_scores(examination, student, teacher.model, spec.seed))
    except DataError as problem:
        raise DataError(f"{problem}; the student is in {out}, not judged") from problem
    write_atomically(out / STUDENT, json.dumps(taught.table(), indent=1))
    return taught


@dataclass(frozen=True)
class _Teacher:
    """Whose model teaches.

    Attributes:
        said: the run, the node and a fingerprint of its tunables.
        writer: of what it draws, as its tokens.
    """

    said: Mapping[str, str]
    node: Node
    site: Site
    model: PairModel
    writer: PairWriter

    @classmethod
    def of(cls, folder: Path, recipe: recipes.Recipe, topology: Topology, edge: str | None) -> _Teacher:
        node = topology.nodes[edge or topology.cloud_id]
        digest = _digest(tunables_file(folder, edge))  # of what teaches: the run may be resumed meanwhile
        model = PairModel.of(load_tuned(folder, edge=edge), folder / BACKBONE)
        writer = PairWriter(model.tokenizer, model.images, recipe.model.context_length)
        said = {"run": recipe.name, "node_id": node.node_id, "tunables": digest}
        return cls(said, node, topology.sites[node.site_id], model, writer)


def captions_taught(folder: Path, cloud_id: str, edge: str | None) -> list[str]:
    """What the cloud of a run has learnt from all edges, or from one.

    Raises:
        RunError: if that is nothing, or the cloud's disk is not here.
    """
    path = folder / NODES / cloud_id / versions.FOLDER / "state.safetensors"
    taught = RelayState.load(path).taught if path.exists() else {}
    found = {said for name, own in taught.items() if edge in (None, name) for said in own.samples.captions}
    if not found:
        raise RunError(
            f"{folder} does not say what its cloud has learnt from {edge or 'any edge'} (nothing after a rollback); "
            'say what to teach with --caption, for example --caption "a handwritten seven"'
        )
    return sorted(found)


def make_room(out: Path) -> None:
    """See that a folder can be put there, before any work, and that nothing is overwritten.

    Raises:
        StorageError: if not.
    """
    if os.path.lexists(out):  # an empty folder may be a mount, or the one that somebody is in: neither can be replaced
        raise StorageError(f"{out} exists already; give another --out, or remove it")
    make_folder(out.parent)
    try:
        with tempfile.TemporaryDirectory(dir=out.parent, prefix=_UNFINISHED):
            pass
    except OSError as problem:
        raise StorageError(f"cannot write to {out.parent}: {problem.strerror}; give another --out") from problem


def num_parameters(model: nn.Module) -> int:
    """Of a model; shared ones once."""
    return sum(parameter.numel() for parameter in model.parameters())


def _check_teacher(folder: Path, recipe: recipes.Recipe, topology: Topology, edge: str | None) -> None:
    if not recipe.data.is_pairs:
        raise CheckpointError(f"{folder} holds a model that draws no pictures; give a run of the recipe pairs")
    if edge not in (None, *topology.edge_ids):
        raise CheckpointError(f"there is no {edge!r} in {folder}; its edges are {', '.join(topology.edge_ids)}")
    check_ended(folder)
    if edge is not None and not tuned_folder(folder, edge).exists():
        raise CheckpointError(f"{folder} has one model for all edges; leave --edge out")


def _taught(
    teacher: _Teacher, asked: Sequence[str], spec: StudentSpec, out: Path, on_detail: OnDetail
) -> tuple[TaughtStudent, PreTrainedModel]:
    meter = CpuMeter(teacher.node.node_id)
    with on_one_thread():
        pairs, student = _drawn_and_learnt(teacher, asked, spec, on_detail)
    usage, known = meter.take("relay"), set(pairs.captions)
    taught = TaughtStudent(
        folder=out,
        spec=spec,
        teacher=teacher.said,
        captions=sorted(known),
        unknown=[caption for caption in asked if caption not in known],
        num_parameters=num_parameters(student),
        num_teacher_parameters=num_parameters(teacher.model.model),
        num_drawings=len(pairs),
        usage=usage,
        bill=bill(usage, (), teacher.node, teacher.site, Constants()),
        scores={},
    )
    return taught, student


def _drawn_and_learnt(
    teacher: _Teacher, asked: Sequence[str], spec: StudentSpec, on_detail: OnDetail
) -> tuple[Pairs, PreTrainedModel]:
    """The drawings, and the student that has learnt from them."""

    def on_phase(phase: str, done: int, total: int) -> None:
        on_detail(phase, done, total, "")

    def on_step(_: str, step: int, total: int, loss: float) -> None:
        on_detail("learning", step, total, f"loss {loss:.3f}")

    model = teacher.model
    if spec.kind == "classifier":
        _check_labels(asked, asked)
    pairs = draw_pairs(model, asked, spec.num_samples, spec.seed, on_phase)
    if spec.kind == "classifier":
        labels = sorted(set(pairs.captions))
        _check_labels(labels, asked)
        return pairs, taught_classifier(small_classifier(model.images.config, labels), pairs, spec.settings, on_step)
    passages = write_pairs(teacher.writer, pairs, OF_DRAWINGS, spec.seed, on_phase)
    return pairs, teach_decoder(small_decoder(model.model.config), passages, spec.settings, on_step).eval()


def _check_labels(known: Sequence[str], asked: Sequence[str]) -> None:
    if len(known) < 2:
        others = ", ".join(repr(caption) for caption in asked if caption not in known)
        unknown = f", since the teacher does not know {others}" if others else ""
        raise DataError(f"a classifier tells captions apart, and there is but {known[0]!r}{unknown}; give two or more")


def _scores(examination: Examination, student: PreTrainedModel, teacher: PairModel, seed: int) -> dict[str, Scores]:
    if isinstance(student, ViTForImageClassification):
        own = examination.classifier(student)
    else:
        own = examination.generator(PairModel(student, teacher.tokenizer, teacher.images), seed)
    return {"student": own, "teacher": examination.generator(teacher, seed)}


def _save(taught: TaughtStudent, student: PreTrainedModel, backbone: Path) -> None:
    """Put the whole folder in place in one step."""
    out = taught.folder
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=_UNFINISHED) as temporary:
        folder = make_folder(Path(temporary) / "student")
        try:
            student.save_pretrained(folder)
        except (OSError, SafetensorError) as problem:
            raise StorageError(f"cannot write to {out.parent}: {problem}; free some space") from problem
        if taught.spec.kind == "decoder":
            write_text_files(folder, read_text_files(backbone))
        write_atomically(folder / STUDENT, json.dumps(taught.table(), indent=1))
        put_folder(folder, out)


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()[:16]
