"""What only images or only text have, asked for in a recipe of the other kind."""

from __future__ import annotations

from collections.abc import Iterator

from ecogen.config.contradictions.contradiction import Contradiction
from ecogen.config.schema import Recipe

_PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj")
"""What LoRA may be added to in a vision transformer."""


def of_kind(recipe: Recipe) -> Iterator[Contradiction]:
    """What does not go with images, or with text."""
    yield from _of_text(recipe) if recipe.data.is_text else _of_images(recipe)


def _of_images(recipe: Recipe) -> Iterator[Contradiction]:
    for target in recipe.tunables.lora_targets:
        if target not in _PROJECTIONS:
            said = f"{target!r} is no projection of a vision transformer; name some of {', '.join(_PROJECTIONS)}"
            yield _contradiction("tunables.lora_targets", said)
    if recipe.data.partition.across_edges == "domain":
        yield _contradiction("data.partition.across_edges", "images have no domains; set 'iid' or 'dirichlet'")
    if recipe.pretraining.corpus == "documentation":
        yield _contradiction("pretraining.corpus", "'documentation' is text; set 'glyphs' or 'data'")


def _of_text(recipe: Recipe) -> Iterator[Contradiction]:
    for place, is_wrong, said in _wrong_for_text(recipe):
        if is_wrong:
            yield _contradiction(place, said)
    model, data = recipe.model, recipe.data
    if model.source == "pretrain" and recipe.pretraining.corpus != "documentation":
        yield _contradiction("pretraining.corpus", "a text model learns from text; set 'documentation'", "model.source")
    if (model.hidden_size // model.num_heads) % 2:
        said = f"{model.num_heads} heads of width {model.hidden_size // model.num_heads}, which is to be even"
        yield _contradiction("model.num_heads", said, "model.hidden_size")
    if bool(data.path) != (data.name == "text"):
        said = "'text' is what data.path names; give one" if data.name == "text" else "set data.name = 'text'"
        yield _contradiction("data.path", said)


def _wrong_for_text(recipe: Recipe) -> Iterator[tuple[str, bool, str]]:
    """Place, whether it is wrong there, and what to do."""
    tunables, tuning, data, evaluation = recipe.tunables, recipe.tuning, recipe.data, recipe.evaluation
    blocks = tunables.blocks.values()
    has_prompts = bool(tunables.prompts) or any(own.prompts for own in blocks)
    is_backbone = tunables.backbone != "frozen" or any(own.backbone not in (None, "frozen") for own in blocks)
    yield "tunables.prompts", has_prompts, "prompts are visual ones, which a decoder of text has not; set 0"
    yield "tunables.head", tunables.head, "a decoder of text has no head of its own for the task; set false"
    has_bottleneck = bool(tunables.bottleneck) or any(own.bottleneck for own in blocks)
    yield "tunables.bottleneck", has_bottleneck, "plain PEFT has none, so nothing else could load the model; set 0"
    yield "tunables.backbone", is_backbone, "of a decoder of text only adapters train; set 'frozen'"
    yield "tuning.augmentation", bool(tuning.augmentation), "moves images; set 0 for text"
    yield "tuning.augmentation_views", bool(tuning.augmentation_views), "are of images; set 0 for text"
    yield "tuning.unlabelled.method", tuning.unlabelled.method != "ignore", "text needs no labels; set 'ignore'"
    yield "data.labelled", data.labelled < 1, "text needs no labels; set 1"
    yield "data.labels_of_edges", bool(data.labels_of_edges), "text has no classes; leave it out"
    yield (
        "data.partition.across_edges",
        data.partition.across_edges == "dirichlet",
        ("Dirichlet draws are of classes, which text has not; set 'domain' or 'iid'"),
    )
    yield (
        "data.partition.within_edge",
        data.partition.within_edge == "dirichlet",
        ("Dirichlet draws are of classes, which text has not; set 'iid'"),
    )
    yield "evaluation.inversion", evaluation.inversion, "the attacks are on images; set false for text"
    yield (
        "data.test",
        evaluation.split == "test" and not data.test,
        ("say how many passages of each edge are held out; or set evaluation.split"),
    )


def _contradiction(place: str, said: str, *others: str) -> Contradiction:
    return Contradiction((place, "data.name", *others), f"{place}: {said}")
