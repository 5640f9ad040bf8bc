"""Making foundation models: vision transformers, decoders of text, and generators of images and captions."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase, ViTConfig, ViTModel

from ecogen import config as recipes
from ecogen.models.image_tokenizer import ImageTokenizer, ImageTokens, save_image_tokenizer
from ecogen.tuning.corpus import digest_of, open_corpus
from ecogen.tuning.documentation import cloud_topics
from ecogen.tuning.documents import Document
from ecogen.tuning.encoding import stream_of
from ecogen.tuning.pairs import PairWriter
from ecogen.tuning.pretrain import RECIPE_VERSION, pretrain, untrained
from ecogen.tuning.pretrain_decoder import TEXT_VERSION, Batches, llama_config, new_llama, pretrain_decoder, windows
from ecogen.tuning.pretrain_pairs import PAIRS_VERSION, all_captions, cloud_passages, glyph_views
from ecogen.tuning.quantizer import train_image_tokenizer
from ecogen.tuning.vocabulary import train_tokenizer

OnStep = Callable[[str, int, int, float], None]
"""Called with the phase, the step, how many there are, and the loss."""

_OF_TEXT = ("vocabulary_size", "context_length")
_OF_IMAGES = ("image_size", "patch_size", "num_channels")
_OF_PAIRS = ("codebook_size",)
"""Sizes of the model that other kinds have not, and which so are no part of what makes these what they are."""


def identity_of(recipe: recipes.Recipe) -> str:
    """What tells the model that a recipe makes from others: everything that makes it what it is.

    Raises:
        DataError: if the data set that it learns from is missing or damaged.
    """
    data, sizes, pretraining = recipe.data, *map(recipes.section_table, (recipe.model, recipe.pretraining))
    others = () if data.is_pairs else (*_OF_PAIRS, *(_OF_IMAGES if data.is_text else _OF_TEXT))
    made_by: dict[str, Any] = {name: value for name, value in sizes.items() if name not in others}
    made_by |= {"pretraining": {name: pretraining[name] for name in pretraining if name not in _steps_of_others(data)}}
    made_by |= {"version": _version(data), "torch": torch.__version__, "corpus": _corpus_digest(recipe)}
    return hashlib.sha256(json.dumps(made_by, sort_keys=True).encode()).hexdigest()[:16]


def _steps_of_others(data: recipes.Data) -> tuple[str, ...]:
    return () if data.is_pairs else ("image_steps",)


def _version(data: recipes.Data) -> int:
    return PAIRS_VERSION if data.is_pairs else TEXT_VERSION if data.is_text else RECIPE_VERSION


def _corpus_digest(recipe: recipes.Recipe) -> str:
    """What tells one corpus from others, wherever its file is; rendered glyphs are the program's own."""
    if recipe.data.is_text and not recipe.data.is_pairs:
        return _text_digest()
    return digest_of(recipe.pretraining, recipe.data)


@dataclass(frozen=True)
class MadeHere:
    """A model and what turns its examples into its tokens."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase | None = None
    images: ImageTokenizer | None = None

    def save(self, folder: Path) -> None:
        """Write it as a folder."""
        self.model.save_pretrained(folder)
        if self.tokenizer is not None:
            self.tokenizer.save_pretrained(folder)
        if self.images is not None:
            save_image_tokenizer(self.images, folder)


def make_model(recipe: recipes.Recipe, on_step: OnStep) -> MadeHere:
    """The foundation model of a recipe; the same for the same recipe and number of threads."""
    if recipe.data.is_pairs:
        return _pair_model(recipe, on_step)
    return _text_model(recipe, on_step) if recipe.data.is_text else MadeHere(_model(recipe, on_step))


def _model(recipe: recipes.Recipe, on_step: OnStep) -> ViTModel:
    config, corpus = vit_config(recipe.model), open_corpus(recipe.pretraining, recipe.data)
    if recipe.model.source == "untrained":
        return untrained(config, corpus, recipe.pretraining.seed)
    arguments = asdict(recipe.pretraining)
    for name in ("corpus", "image_steps"):
        del arguments[name]
    return pretrain(config, corpus, on_step=on_step, **arguments)


def _text_model(recipe: recipes.Recipe, on_step: OnStep) -> MadeHere:
    """A tokenizer of the corpus, and a small Llama that was shown it."""
    texts = cloud_topics()
    tokenizer = train_tokenizer(texts, recipe.model.vocabulary_size)
    stream = torch.tensor(stream_of([Document(text) for text in texts], tokenizer))
    return MadeHere(_decoder(recipe, tokenizer, windows(stream, recipe.model.context_length), on_step), tokenizer)


def _pair_model(recipe: recipes.Recipe, on_step: OnStep) -> MadeHere:
    """A tokenizer of captions, one of images, and a small Llama that was shown glyphs with captions."""
    sizes, spec = recipe.model, recipe.pretraining
    views = glyph_views(sizes.num_channels, sizes.image_size)
    images = train_image_tokenizer(
        ImageTokens(sizes.image_size, sizes.patch_size, sizes.num_channels, sizes.codebook_size),
        lambda count, generator: views(count, generator)[0],
        steps=spec.image_steps,
        batch_size=spec.batch_size,
        learning_rate=spec.learning_rate,
        seed=spec.seed,
        on_step=on_step,
    )
    tokenizer = train_tokenizer(all_captions(), sizes.vocabulary_size, sizes.codebook_size)
    writer = PairWriter(tokenizer, images, sizes.context_length)
    batches = cloud_passages(writer, sizes.num_channels, sizes.image_size)
    return MadeHere(_decoder(recipe, tokenizer, batches, on_step), tokenizer, images)


def _decoder(
    recipe: recipes.Recipe, tokenizer: PreTrainedTokenizerBase, batches: Batches, on_step: OnStep
) -> PreTrainedModel:
    config, spec = llama_config(recipe.model, tokenizer), recipe.pretraining
    if recipe.model.source == "untrained":
        return new_llama(config, spec.seed)
    return pretrain_decoder(
        config,
        batches,
        seed=spec.seed,
        on_step=on_step,
        steps=spec.steps,
        batch_size=spec.batch_size,
        matrix_rate=spec.matrix_rate,
        learning_rate=spec.learning_rate,
        weight_decay=spec.weight_decay,
    )


def _text_digest() -> str:
    """What tells this Python's documentation from others'."""
    return hashlib.sha256("\0".join(cloud_topics()).encode()).hexdigest()


def vit_config(model: recipes.Model) -> ViTConfig:
    """The configuration of the model that a recipe has pre-trained."""
    return ViTConfig(
        hidden_size=model.hidden_size,
        num_hidden_layers=model.num_blocks,
        num_attention_heads=model.num_heads,
        intermediate_size=model.intermediate_size,
        image_size=model.image_size,
        patch_size=model.patch_size,
        num_channels=model.num_channels,
    )
