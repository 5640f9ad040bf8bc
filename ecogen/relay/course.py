"""A course: a generator teaches a student that is made anew, by what it draws and nothing else.

Settings are those of benchmarks/relay_students.py, which says what a course is worth beside one of real data.

Shapes: N pairs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from transformers import LlamaConfig, PreTrainedConfig, ViTConfig, ViTForImageClassification

from ecogen.config import Pretraining
from ecogen.errors import DataError
from ecogen.models.image_tokenizer import ImageTokens
from ecogen.models.pair_model import OnDrawn, PairModel
from ecogen.relay.students import OnStep, teach_classifier
from ecogen.relay.teacher import teach
from ecogen.tuning.augment import augment
from ecogen.tuning.pairs import Pairs

Kind = Literal["decoder", "classifier"]
"""A smaller generator, which draws and describes, or a vision transformer, which names what it sees."""

SAMPLES = 10_000

_TIMES = 1.4
"""So many times as many are drawn, of which those are kept that the teacher is surest of."""

TEMPERATURE = 0.85
"""Of drawings for students. At 1 more show something else than asked: half a point fewer real digits are read right."""

LESSONS = {
    "decoder": Pretraining(steps=2000, batch_size=64, matrix_rate=0.02, learning_rate=3e-3, weight_decay=0.1),
    "classifier": Pretraining(steps=1800, batch_size=64, learning_rate=2e-3, weight_decay=0.05),
}

_HEAD_WIDTH = 24
_CLASSIFIER = {"hidden_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 128}


@dataclass(frozen=True)
class Views:
    """Moved views of each pair that a decoder learns from beside it; a classifier moves pictures by itself."""

    number: int
    strength: float


OF_DRAWINGS = Views(4, 1.0)


def draw_pairs(
    teacher: PairModel, captions: Sequence[str], number: int, seed: int, on_drawn: OnDrawn | None = None
) -> Pairs:
    """So many pairs at most of these captions, of each as many as of the others.

    Raises:
        DataError: if the teacher reads too little of what it drew as it was asked for.
    """
    generator = torch.Generator().manual_seed(seed)
    evidence = dict.fromkeys(captions, 0)
    samples = teach(teacher, evidence, number, generator, TEMPERATURE, times=_TIMES, on_drawn=on_drawn).samples
    if not len(samples):
        raise DataError(
            f"the teacher knows none of the captions {', '.join(map(repr, captions))}: it does not read what it draws "
            "of them as what was asked for; give others"
        )
    return Pairs(teacher.images.decode(samples.codes), samples.captions)


def with_views(pairs: Pairs, views: Views, seed: int) -> Pairs:
    """The pairs, and moved views of them."""
    generator = torch.Generator().manual_seed(seed)
    moved = [augment(pairs.images, views.strength, generator) for _ in range(views.number)]
    return Pairs(torch.cat([pairs.images, *moved]), [*pairs.captions] * (1 + views.number))


def small_decoder(teacher: PreTrainedConfig) -> LlamaConfig:
    """A Llama of the teacher's tokens, about half as wide and half as deep: a quarter of the numbers or fewer."""
    num_heads = max(1, teacher.hidden_size // 2 // _HEAD_WIDTH)
    head_width = min(_HEAD_WIDTH, 2 * max(1, teacher.hidden_size // 4))
    sizes = {
        "hidden_size": num_heads * head_width,
        "intermediate_size": max(2, teacher.intermediate_size // 2),
        "num_hidden_layers": max(1, teacher.num_hidden_layers // 2),
        "num_attention_heads": num_heads,
        "num_key_value_heads": num_heads,
        "head_dim": head_width,
    }
    return LlamaConfig(**{**teacher.to_dict(), **sizes})


def small_classifier(images: ImageTokens, labels: Sequence[str]) -> ViTConfig:
    """A small vision transformer for the pictures that a generator draws."""
    return ViTConfig(
        **_CLASSIFIER,
        image_size=images.image_size,
        patch_size=images.patch_size,
        num_channels=images.num_channels,
        id2label=dict(enumerate(labels)),
        label2id={label: place for place, label in enumerate(labels)},
    )


def taught_classifier(config: ViTConfig, pairs: Pairs, spec: Pretraining, on_step: OnStep) -> ViTForImageClassification:
    """A vision transformer whose labels are captions, and that has learnt from pairs."""
    labels = torch.tensor([config.label2id[caption] for caption in pairs.captions])
    return teach_classifier(config, pairs.images, labels, spec, on_step)
