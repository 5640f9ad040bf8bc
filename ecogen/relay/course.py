"""A course: a generator teaches a student that is made anew, by what it draws and nothing else.

Sizes and settings were chosen for the recipe `pairs`, on digits that edges tune on; what was tried, and what a course
is worth beside one of real data, is in docs/benchmarks.md, "Students of the cloud's generator".

Shapes: N pairs.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from transformers import LlamaConfig, PreTrainedConfig, ViTConfig, ViTForImageClassification

from ecogen.config import Pretraining
from ecogen.errors import DataError
from ecogen.models.image_tokenizer import ImageTokens
from ecogen.models.pair_model import PairModel
from ecogen.relay.students import OnStep, teach_classifier
from ecogen.relay.teacher import OnPhase, teach
from ecogen.tuning.augment import augment
from ecogen.tuning.pairs import Pairs, PairWriter
from ecogen.tuning.passages import Passages, joined

Kind = Literal["decoder", "classifier"]
"""A smaller generator, which draws and describes, or a vision transformer, which names what it sees."""

SAMPLES = 10_000

TEMPERATURE = 0.85
"""Of drawings for students. At 1 more show something else than asked: half a point fewer real digits are read right."""

_TIMES = 1.4
"""So many times as many are drawn, of which those are kept that the teacher is surest of: of ten, seven."""

SETTINGS: dict[Kind, Pretraining] = {
    "decoder": Pretraining(steps=2000, batch_size=64, matrix_rate=0.02, learning_rate=3e-3, weight_decay=0.1),
    "classifier": Pretraining(steps=1800, batch_size=64, learning_rate=2e-3, weight_decay=0.05),
}

_HEAD_WIDTH = 24  # of a decoder's attention; four heads, where the teacher is 192 wide
_CLASSIFIER = {"hidden_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 128}


@dataclass(frozen=True)
class Views:
    """Moved views of each pair that a decoder learns from beside it; a classifier moves pictures by itself."""

    number: int
    strength: float


OF_DRAWINGS = Views(4, 1.0)
"""Of drawings: as far as `augment` goes. With them 0.929 of real digits were read right, without 0.911."""


def draw_pairs(
    teacher: PairModel, captions: Sequence[str], number: int, seed: int, on_phase: OnPhase | None = None
) -> Pairs:
    """So many pairs at most of these captions, of each as many as of the others; none of one that it does not know.

    Raises:
        DataError: if the teacher knows none of them: it does not read what it drew as what was asked for.
    """
    generator = torch.Generator().manual_seed(seed)
    evidence = dict.fromkeys(captions, 0)
    samples = teach(teacher, evidence, number, generator, TEMPERATURE, times=_TIMES, on_phase=on_phase).samples
    if not len(samples):
        raise DataError(
            f"the teacher knows none of the captions {', '.join(map(repr, captions))}: it does not read what it draws "
            "of them as what was asked for; give others"
        )
    return Pairs(teacher.images.decode(samples.codes), samples.captions)


def write_pairs(writer: PairWriter, pairs: Pairs, views: Views, seed: int, on_phase: OnPhase | None = None) -> Passages:
    """The pairs and moved views of them, each told both ways."""
    written = list[Passages]()
    for images in _views(pairs, views, seed):
        written.append(writer.both(Pairs(images, pairs.captions)))
        if on_phase is not None:
            on_phase("writing", len(written), 1 + views.number)
    return joined(written)


def _views(pairs: Pairs, views: Views, seed: int) -> Iterator[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    yield pairs.images
    for _ in range(views.number):
        yield augment(pairs.images, views.strength, generator)


def small_decoder(teacher: PreTrainedConfig) -> LlamaConfig:
    """A Llama of the teacher's tokens, about half as wide and half as deep: of `pairs`, a seventh of the numbers."""
    num_heads = max(1, teacher.hidden_size // 2 // _HEAD_WIDTH)
    head_width = min(_HEAD_WIDTH, 2 * max(1, teacher.hidden_size // 4))  # even, for rotary positions
    width = num_heads * head_width
    return LlamaConfig(
        vocab_size=teacher.vocab_size,
        hidden_size=width,
        intermediate_size=8 * width // 3,
        num_hidden_layers=max(1, teacher.num_hidden_layers // 2),
        num_attention_heads=num_heads,
        num_key_value_heads=num_heads,
        head_dim=head_width,
        max_position_embeddings=teacher.max_position_embeddings,
        tie_word_embeddings=True,
        bos_token_id=teacher.bos_token_id,
        eos_token_id=teacher.eos_token_id,
        pad_token_id=teacher.pad_token_id,
    )


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
