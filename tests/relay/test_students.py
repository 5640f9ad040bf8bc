from __future__ import annotations

import torch
from transformers import LlamaConfig, ViTConfig

from ecogen.config import Pretraining
from ecogen.models.image_tokenizer import ImageTokenizer
from ecogen.relay.students import labels_of, teach_classifier, teach_decoder
from ecogen.tuning.pairs import PairWriter
from ecogen.tuning.vocabulary import train_tokenizer
from tests.pictures import SIZES


def test_a_decoder_learns_what_samples_say() -> None:
    tokenizer = train_tokenizer(["one", "two"], 300, SIZES.codebook_size)
    writer = PairWriter(tokenizer, ImageTokenizer(SIZES).eval(), 16)
    codes = torch.tensor([[1, 1, 1, 1], [2, 2, 2, 2]] * 8)
    samples = writer.both_of(["one", "two"] * 8, codes)
    config = LlamaConfig(
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        vocab_size=len(tokenizer),
        pad_token_id=tokenizer.pad_token_id,
    )
    losses: list[float] = []
    spec = Pretraining(steps=60, batch_size=8, learning_rate=1e-2)
    student = teach_decoder(config, samples, spec, lambda *step: losses.append(step[3]))
    assert losses[-1] < 0.2 * losses[0]
    again = teach_decoder(config, samples, spec, lambda *_: None)
    pairs = zip(student.parameters(), again.parameters(), strict=True)
    assert all(torch.equal(ours, theirs) for ours, theirs in pairs)


def test_a_classifier_learns_what_images_show() -> None:
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(64, 1, 8, 8, generator=generator) * 0.3
    labels = torch.arange(64) % 2
    images[labels == 1, :, 2:6, 2:6] += 0.7
    config = ViTConfig(
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        image_size=8,
        patch_size=4,
        num_channels=1,
        num_labels=2,
    )
    student = teach_classifier(
        config, images[:48], labels[:48], Pretraining(steps=200, batch_size=16, learning_rate=1e-2), lambda *_: None
    )
    assert torch.equal(labels_of(student, images[48:]), labels[48:])
