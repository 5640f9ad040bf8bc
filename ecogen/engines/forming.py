"""Clusters formed of a recipe's pool before a run begins. Imports no torch."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

from ecogen import config as recipes
from ecogen.errors import CheckpointError, PlacementError
from ecogen.models.profile import VISION, shape_of
from ecogen.planning.clusters import form_clusters
from ecogen.planning.cost import ModelShape


def formed(recipe: recipes.Recipe) -> recipes.Recipe:
    """The recipe with its pool's clusters in it; as it is where there are none to form.

    The same recipe gives the same clusters. They are written down with the run, and sent to its nodes.

    Raises:
        PlacementError: if the pool cannot hold so many models, or it is not known yet how large a model is.
        CheckpointError: if the model's folder cannot be read.
        ConfigError: if an edge has fewer clusters now than its aggregation needs.
    """
    if not recipes.is_unformed(recipe.topology):
        return recipe
    clusters = form_clusters(recipe, announced_shape(recipe))
    return recipes.checked(replace(recipe, topology=replace(recipe.topology, clusters=clusters)))


def announced_shape(recipe: recipes.Recipe) -> ModelShape:
    """The sizes of a recipe's model before there is one: of the recipe itself, or of the model's folder.

    Raises:
        PlacementError, CheckpointError: as `formed`.
    """
    model = recipe.model
    if model.source.startswith("hf:"):
        raise PlacementError(
            f"the sizes of {model.source!r} are not known before it is here; download it and give its folder as "
            "model.source"
        )
    config = SimpleNamespace(
        model_type="llama" if recipe.data.is_text else VISION,
        hidden_size=model.hidden_size,
        num_hidden_layers=model.num_blocks,
        intermediate_size=model.intermediate_size,
        image_size=model.image_size,
        patch_size=model.patch_size,
        num_channels=model.num_channels,
        num_attention_heads=model.num_heads,
        vocab_size=model.vocabulary_size,
        tie_word_embeddings=model.source in recipes.MADE_HERE,
    )
    if model.source not in recipes.MADE_HERE:
        vars(config).update(_read_config(Path(model.source)))
    config.num_labels = recipes.NUM_LABELS  # a head's size decides no placement
    return shape_of(config, recipe)


def _read_config(folder: Path) -> dict[str, object]:
    try:
        table: dict[str, object] = json.loads((folder / "config.json").read_text())
    except (OSError, ValueError) as problem:
        raise CheckpointError(
            f"{folder} is no model folder: its config.json cannot be read ({problem}); give one of save_pretrained"
        ) from problem
    return table
