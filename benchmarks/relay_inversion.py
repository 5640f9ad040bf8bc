"""A teacher that cannot draw: `python -m benchmarks.relay_inversion [--run runs/pairs] [--seeds 5]`.

A vision transformer that learnt the edges' real digits teaches one of a fifth of its size without data, by images that
were optimised against it. Beside it stands the same student, with as many steps, taught by what the cloud's generator
of `ecogen run pairs` draws, by real training pairs, by images optimised by the teacher's weights alone, and, with the
teacher's soft labels, by noise and by glyphs that the cloud renders, which nobody optimised. The teacher is one; each
seed has its own lesson and its own student. Settings of inversion were chosen on validation pairs, none of drawing. The
two teachers do not know the same: the generator learnt from the edges' drawings and gives captions; the classifier
learnt from the digits themselves, has statistics of them, and gives probabilities.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import tempfile
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch.utils.flop_counter import FlopCounterMode
from transformers import ViTConfig, ViTForImageClassification

from benchmarks.common import circumstances, wait_until_quiet, write_result
from ecogen import config as recipes
from ecogen.config import Pretraining
from ecogen.engines import session
from ecogen.engines.run_folder import load_recipe
from ecogen.models.adapters import BACKBONE, load_tuned
from ecogen.models.pair_model import PairModel
from ecogen.relay.assessment import Assessor
from ecogen.relay.inversion import InversionTeacher, Settings, statistics_of
from ecogen.relay.lessons import DrawingTeacher, ImageLesson, Teacher
from ecogen.relay.quality import copied_share, nearest_distances, told_apart
from ecogen.relay.students import labels_of, teach_classifier
from ecogen.tuning.captions import DIGITS, digit_caption, digit_of
from ecogen.tuning.pretrain_pairs import glyph_views

CLASSES = range(len(DIGITS))
SAMPLES = 520
"""Images of a lesson; of real ones all there are."""

MANY = 2000
"""Nearly four times as many: about what optimising `SAMPLES` costs."""

LARGE = {"hidden_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 256}
SMALL = {"hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 128}
TEACHER = Pretraining(seed=100, steps=1200, batch_size=64, learning_rate=1e-3, weight_decay=0.05)
STUDENT = Pretraining(steps=400, batch_size=64, learning_rate=2e-3, weight_decay=0.05)

KEPT = 0.97
"""Of what the same student reaches that is taught real data, the least that is a success; as in relay_students."""

INVERSION, BLIND, DRAWINGS, MORE = "inversion", "weights alone", "drawings", "more drawings"
REAL, GLYPHS, NOISE = "real data", "public glyphs", "noise"


@dataclass(frozen=True)
class Room:
    """Two teachers, and the real digits of a run's edges by part."""

    inverting: InversionTeacher
    blind: InversionTeacher
    drawing: DrawingTeacher
    size: ViTConfig
    parts: dict[str, ImageLesson]

    def real(self, seed: int) -> ImageLesson:
        """All that the edges tune on."""
        return self.parts["train"]

    def noise(self, seed: int) -> ImageLesson:
        """Images of nothing, and what the teacher says of them."""
        generator = torch.Generator().manual_seed(seed)
        images = torch.rand(SAMPLES, *self.parts["test"].images.shape[1:], generator=generator)
        said = self.inverting.probabilities(images)
        return ImageLesson(images, said.argmax(-1), said)

    def glyphs(self, seed: int) -> ImageLesson:
        """Public images that nobody optimised, rendered letters and digits, and what the teacher says of them."""
        channels, size = self.parts["test"].images.shape[1:3]
        images, _ = glyph_views(channels, size)(SAMPLES, torch.Generator().manual_seed(seed))
        said = self.inverting.probabilities(images)
        return ImageLesson(images, said.argmax(-1), said)

    def of(self, teacher: Teacher, number: int = SAMPLES) -> Callable[[int], ImageLesson]:
        """A teacher's lesson, as a function of the seed."""
        return lambda seed: teacher.lesson(CLASSES, number, torch.Generator().manual_seed(seed))

    @property
    def lessons(self) -> dict[str, Callable[[int], ImageLesson]]:
        """All that are compared, each as a function of the seed."""
        mine = {INVERSION: self.of(self.inverting), BLIND: self.of(self.blind), DRAWINGS: self.of(self.drawing)}
        mine[MORE] = self.of(self.drawing, MANY)
        return mine | {REAL: self.real, GLYPHS: self.glyphs, NOISE: self.noise}


def gather(run: Path) -> tuple[Room, ViTForImageClassification]:
    """What a run left, and a classifier that learns its digits."""
    recipe = load_recipe(run)
    edge_ids = recipes.build_topology(recipe.topology).edge_ids
    splits = Assessor.of(recipe, edge_ids).splits.values()
    parts = dict[str, ImageLesson]()
    for part in ("train", "validation", "test"):
        pairs = [getattr(own, part) for own in splits]
        labels = [digit_of(caption) for each in pairs for caption in each.captions]
        parts[part] = ImageLesson(torch.cat([each.images for each in pairs]), torch.tensor(labels))
    model, seen = recipe.model, parts["train"]
    size = ViTConfig(
        image_size=model.image_size,
        patch_size=model.patch_size,
        num_channels=model.num_channels,
        num_labels=len(DIGITS),
    )
    classifier = teach_classifier(sized(size, LARGE), seen.images, seen.labels, TEACHER, lambda *_: None)
    known = statistics_of(classifier, seen.images, seen.labels)
    generator = PairModel.of(load_tuned(run), run / BACKBONE)
    drawing = DrawingTeacher(generator, {digit: digit_caption(digit) for digit in CLASSES})
    room = Room(InversionTeacher(classifier, known), InversionTeacher(classifier), drawing, size, parts)
    return room, classifier


def sized(size: ViTConfig, widths: dict[str, int]) -> ViTConfig:
    """A vision transformer for the same images."""
    return ViTConfig.from_dict(size.to_dict() | widths)


def taught(room: Room, lesson: ImageLesson, seed: int) -> ViTForImageClassification:
    """A student, made anew, that has had a lesson."""
    spec = replace(STUDENT, seed=seed)
    own = sized(room.size, SMALL)
    return teach_classifier(
        own, lesson.images, lesson.labels, spec, lambda *_: None, probabilities=lesson.probabilities
    )


def accuracy(model: ViTForImageClassification, part: ImageLesson) -> float:
    """The share of images that it names right."""
    return float((labels_of(model, part.images) == part.labels).double().mean())


def measure(room: Room, seeds: int, part: str) -> dict[str, Any]:
    """Every lesson's students, seed by seed; methods take turns, so that what disturbs one disturbs all."""
    runs: dict[str, list[dict[str, float]]] = {name: [] for name in room.lessons}
    for seed in range(seeds):
        for name, give in room.lessons.items():
            began_s = time.process_time()
            with FlopCounterMode(display=False) if seed == 0 else nullcontext() as counted:
                lesson = give(seed)
            spent_s = time.process_time() - began_s
            runs[name].append(told(lesson) | given_away(room, lesson) | {"cpu_s": spent_s})
            runs[name][-1]["flops"] = counted.get_total_flops() if counted is not None else 0
            runs[name][-1]["accuracy"] = accuracy(taught(room, lesson, seed), room.parts[part])
            print(seed, name, {key: round(value, 4) for key, value in runs[name][-1].items()}, flush=True)
    return {name: summed(own) for name, own in runs.items()}


def told(lesson: ImageLesson) -> dict[str, float]:
    """How many images, and how sure the teacher is that they show what it was asked for."""
    said = lesson.probabilities
    sure = {} if said is None else {"sure": float(said.gather(1, lesson.labels[:, None]).mean())}
    return {"images": len(lesson)} | sure


def given_away(room: Room, lesson: ImageLesson) -> dict[str, float]:
    """What the images tell of training images: near copies, and how well the nearest image tells members (AUC)."""
    train, test = room.parts["train"].images, room.parts["test"].images
    near = [-nearest_distances(part, lesson.images) for part in (train, test)]
    return {"copies": copied_share(lesson.images, train, test), "members": told_apart(near[0], near[1])}


def summed(runs: list[dict[str, float]]) -> dict[str, Any]:
    """Accuracy with its spread; of what making an image costs, CPU time's median, and the operations that were counted.

    CPU time is of runs in which operations were not counted, since counting slows them.
    """
    reached = [run["accuracy"] for run in runs]
    images = statistics.fmean(run["images"] for run in runs)
    timed = runs[1:] or runs
    return {
        "accuracy": {
            "mean": round(statistics.fmean(reached), 4),
            "deviation": round(statistics.stdev(reached), 4) if len(reached) > 1 else None,
            "least": round(min(reached), 4),
            "most": round(max(reached), 4),
        },
        "images": round(images),
        "sure": round(statistics.fmean(run["sure"] for run in runs), 4) if "sure" in runs[0] else None,
        "copies": round(statistics.fmean(run["copies"] for run in runs), 4),
        "members_told": round(statistics.fmean(run["members"] for run in runs), 4),
        "cpu_ms_an_image": round(1e3 * statistics.median(run["cpu_s"] / run["images"] for run in timed), 3),
        "mflops_an_image": round(runs[0]["flops"] / runs[0]["images"] / 1e6, 2),
    }


def goals(found: dict[str, Any], sizes: dict[str, int]) -> dict[str, bool]:
    """What was hoped for, and whether it came."""
    mean = {name: own["accuracy"]["mean"] for name, own in found.items()}
    return {
        f"inversion at least {KEPT} of real data's": mean[INVERSION] >= KEPT * mean[REAL],
        f"drawings at least {KEPT} of real data's": mean[DRAWINGS] >= KEPT * mean[REAL],
        "inversion as good as as many drawings": mean[INVERSION] >= mean[DRAWINGS],
        "inversion as good as more drawings": mean[INVERSION] >= mean[MORE],
        "inversion better than by weights alone in every seed": is_above(found, INVERSION, BLIND),
        "inversion better than public glyphs in every seed": is_above(found, INVERSION, GLYPHS),
        "inversion better than noise in every seed": is_above(found, INVERSION, NOISE),
        "a student at least four times smaller": 4 * sizes["student"] <= sizes["teacher"],
    }


def is_above(found: dict[str, Any], one: str, other: str) -> bool:
    """Whether the worst of one is better than the best of another."""
    return bool(found[one]["accuracy"]["least"] > found[other]["accuracy"]["most"])


def lines(result: dict[str, Any]) -> list[str]:
    """The figures in words, for the table of all benchmarks."""
    rows = [f"teacher: {result['teacher']['accuracy']:.3f} of {result['judged_on']} digits right"]
    for name, own in result["students"].items():
        reached = own["accuracy"]
        said = f"student by {name}: {reached['mean']:.3f} ({reached['least']:.3f} to {reached['most']:.3f})"
        rows.append(f"{said}, {own['cpu_ms_an_image']:.1f} CPU ms an image")
    return rows + [f"{'reached' if met else 'MISSED'}: {goal}" for goal, met in result["goals"].items()]


def main(run: Path | None, seeds: int, part: str = "test") -> dict[str, Any]:
    """Measure and return the figures; of the test part, write benchmarks/results/relay_inversion.json."""
    quiet, where = wait_until_quiet(), circumstances(("torch", "transformers"))
    if run is not None:
        where["command"] = where["command"].replace(str(run), "RUN")
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="ecogen-inversion-") as temporary:
        if run is None:
            run = Path(temporary) / "pairs"
            asyncio.run(session.run(recipes.load("pairs"), run, resume=False, screen=Console(stderr=True)))
        room, classifier = gather(run)
        found = measure(room, seeds, part)
    sizes = {"teacher": num_parameters(sized(room.size, LARGE)), "student": num_parameters(sized(room.size, SMALL))}
    result = where | {
        "others_before": quiet,
        "judged_on": part,
        "seeds": seeds,
        "real_pairs": {name: len(own) for name, own in room.parts.items()},
        "settings": asdict(Settings()),
        "teacher": {"parameters": sizes["teacher"], "accuracy": round(accuracy(classifier, room.parts[part]), 4)},
        "student": {"parameters": sizes["student"], "steps": STUDENT.steps, "batch_size": STUDENT.batch_size},
        "students": found,
        "goals": goals(found, sizes),
    }
    if part == "test":
        write_result("relay_inversion", result)
    return result


def num_parameters(config: ViTConfig) -> int:
    """Of a model with this configuration."""
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in ViTForImageClassification(config).parameters())


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, help="a finished run of the recipe pairs; default a new one")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--part", choices=["validation", "test"], default="test", help="validation writes no result")
    options = parser.parse_args()
    for line in lines(main(options.run, options.seeds, options.part)):
        print(line)
