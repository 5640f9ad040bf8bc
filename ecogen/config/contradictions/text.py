"""What only images, only text or only images with captions have, asked for in a recipe of another kind."""

from __future__ import annotations

from collections.abc import Iterator

from ecogen.config.contradictions.contradiction import Contradiction
from ecogen.config.schema import MADE_HERE, NUM_LABELS, PairSource, Recipe

MARKS = 266
"""Tokens of a tokenizer that is made here besides codes and words: bytes and marks."""

CAPTION = 12
"""Tokens that a caption and the marks around it may take."""

_SAID_OF_PATHS = {
    "text": "'text' is what data.path names; give one",
    "pairs": "pairs come from data.sources, which are read below ECOGEN_DATA; leave it out",
}

_PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj")
"""What LoRA may be added to in a vision transformer."""


def of_kind(recipe: Recipe) -> Iterator[Contradiction]:
    """What does not go with images, or with text."""
    yield from _of_text(recipe) if recipe.data.is_text else _of_images(recipe)
    yield from _of_pairs(recipe)


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
    corpus, learns = ("glyphs", "from glyphs with captions") if data.is_pairs else ("documentation", "from text")
    if model.source in MADE_HERE and recipe.pretraining.corpus != corpus:
        said = f"a model for {data.name!r} learns {learns}; set {corpus!r}"
        yield _contradiction("pretraining.corpus", said, "model.source")
    if (model.hidden_size // model.num_heads) % 2:
        said = f"{model.num_heads} heads of width {model.hidden_size // model.num_heads}, which is to be even"
        yield _contradiction("model.num_heads", said, "model.hidden_size")
    if bool(data.path) != (data.name == "text"):
        yield _contradiction("data.path", _SAID_OF_PATHS.get(data.name, "set data.name = 'text'"))


def _of_pairs(recipe: Recipe) -> Iterator[Contradiction]:
    """Sources of pairs, and whether the sizes have room for them."""
    model, data = recipe.model, recipe.data
    if recipe.relay.is_on:
        yield from _of_relay(recipe)
    elif recipe.relay.tunables:
        said = "they are sent along with lessons, and there are none; set relay.every or relay.drift, or false"
        yield Contradiction(("relay.tunables", "relay.every", "relay.drift"), f"relay.tunables: {said}")
    if not data.is_pairs:
        if recipe.evaluation.crossings:
            said = "only a text-image generator draws and describes; set data.name = 'pairs', or 0"
            yield _contradiction("evaluation.crossings", said)
        if data.sources:
            yield _contradiction("data.sources", "say where pairs are from; set data.name = 'pairs', or leave it out")
        return
    for edge_id, source in data.sources.items():
        for own, place in zip(source.domains, ("labels", "later.labels"), strict=False):
            if own.labels and (own.name not in ("digits", "mnist") or max(own.labels) >= NUM_LABELS):
                said = f"{own.name!r} has no labels {[*own.labels]}; digits and mnist have 0 to {NUM_LABELS - 1}"
                yield _contradiction(f"data.sources.{edge_id}.{place}", said)
        yield from _of_later(recipe, edge_id, source)
    if model.source not in MADE_HERE:
        return
    needed = MARKS + model.codebook_size
    if model.vocabulary_size < needed:
        said = f"{model.vocabulary_size} has no room for {model.codebook_size} codes, marks and bytes; {needed} are"
        yield _contradiction("model.vocabulary_size", said, "model.codebook_size")
    codes = (model.image_size // model.patch_size) ** 2
    if model.context_length < codes + CAPTION:
        said = f"{model.context_length} has no room for {codes} codes and a caption; {codes + CAPTION} at least"
        yield _contradiction("model.context_length", said, "model.patch_size")


def _of_later(recipe: Recipe, edge_id: str, source: PairSource) -> Iterator[Contradiction]:
    if source.later is None:
        return
    place, rounds = f"data.sources.{edge_id}.later", recipe.tuning.rounds
    if source.later.round > rounds:
        said = f"there is no round {source.later.round}; the last is tuning.rounds {rounds}"
        yield _contradiction(f"{place}.round", said, "tuning.rounds")
    if recipe.tuning.cloud_every:
        said = "a domain that changes is for edges that keep models of their own; set tuning.cloud_every = 0"
        yield _contradiction(place, said, "tuning.cloud_every")


def _of_relay(recipe: Recipe) -> Iterator[Contradiction]:
    asked = "relay.every" if recipe.relay.every else "relay.drift"
    if not recipe.data.is_pairs:
        yield _contradiction(asked, "models teach each other by drawing; set data.name = 'pairs', or 0")
    if not recipe.data.validation:
        said = "lessons are refused by what an edge holds out; set data.validation above 0"
        yield _contradiction("data.validation", said, asked)
    if recipe.tuning.cloud_every:
        said = "edges that teach each other keep models of their own, which are not averaged; set 0"
        yield _contradiction("tuning.cloud_every", said, asked)


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
    is_plain_text = not data.is_pairs
    has_views = is_plain_text and bool(tuning.augmentation_views)
    yield "tuning.augmentation", is_plain_text and bool(tuning.augmentation), "moves images; set 0 for text"
    yield "tuning.augmentation_views", has_views, "are of images; set 0 for text"
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
