"""What would keep a recipe from being carried out, found before anything is written or started."""

from __future__ import annotations

from pathlib import Path

from transformers import PreTrainedConfig

from ecogen import config as recipes
from ecogen.accounting.intensity import check_zones
from ecogen.engines.forming import formed
from ecogen.errors import CheckpointError, ConfigError
from ecogen.models.checkpoint import open_foundation
from ecogen.models.profile import shape_of
from ecogen.planning.clusters import place_clusters
from ecogen.topology import Topology
from ecogen.tuning.foundation import known_folder, of_kind
from ecogen.tuning.making import vit_config
from ecogen.tuning.pretrain_decoder import llama_config
from ecogen.tuning.privacy import check_accountant
from ecogen.tuning.strategies import strategy_of
from ecogen.tuning.task import check_sources, task_of


def check_recipe(recipe: recipes.Recipe) -> recipes.Recipe:
    """Check zones, the strategy, privacy's accountant, the examples, the model's folder and every cluster's placement.

    Returns the recipe with its pool's clusters formed.

    Raises:
        ConfigError: if zones (lists them all), the strategy or an edge's labels are unknown; or the accountant is
            missing.
        DataError: if the data set is missing or damaged, or has too few examples.
        CheckpointError: if the model's folder is missing, corrupt or for other images, or has no tokenizer for text.
        PlacementError: if a cluster cannot hold the model.
    """
    if recipe.task == "serve":
        raise ConfigError(["task: this recipe serves a model; use it as `ecogen serve MODEL --recipe RECIPE`"])
    config = _announced_config(recipe)
    recipe = formed(recipe)
    topology = recipes.build_topology(recipe.topology)
    check_zones(site.zone for site in topology.sites.values())
    strategy_of(recipe.aggregation)
    if recipe.privacy.noise_multiplier:
        check_accountant()
    _check_examples(recipe, topology)
    if config is not None:
        if not recipe.data.is_text:
            config.num_labels = recipes.NUM_LABELS
        place_clusters(recipe, shape_of(config, recipe))
    return recipe


def _check_examples(recipe: recipes.Recipe, topology: Topology) -> None:
    folder = known_folder(recipe)
    if recipe.data.is_text and folder is None:  # without a tokenizer the cloud is the first to count passages
        check_sources(recipe, topology.edge_ids)
    else:
        task_of(recipe, topology, folder).check()


def _announced_config(recipe: recipes.Recipe) -> PreTrainedConfig | None:
    """The model's sizes as far as they are known without a network; the cloud checks those of the hub."""
    model = recipe.model
    if model.source in recipes.MADE_HERE:
        return llama_config(model) if recipe.data.is_text else vit_config(model)
    if model.source.startswith("hf:"):
        return None
    config = of_kind(open_foundation(Path(model.source)), recipe).config
    if recipe.data.is_text:
        return config
    for name in ("image_size", "num_channels"):
        if getattr(config, name) != getattr(model, name):
            raise CheckpointError(
                f"{model.source} is a model for {name} {getattr(config, name)}, but the recipe says "
                f"{getattr(model, name)}; set model.{name}={getattr(config, name)}"
            )
    return config
