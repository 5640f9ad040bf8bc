"""What would keep a recipe from being carried out, found before anything is written or started."""

from __future__ import annotations

from pathlib import Path

from transformers import ViTConfig

from ecogen import config as recipes
from ecogen.accounting.intensity import check_zones
from ecogen.engines.forming import formed
from ecogen.errors import CheckpointError, ConfigError
from ecogen.models.checkpoint import open_foundation
from ecogen.models.profile import model_shape
from ecogen.planning.clusters import place_clusters
from ecogen.tuning.data import load_splits, partition_examples
from ecogen.tuning.foundation import vit_config
from ecogen.tuning.labels import label_sets
from ecogen.tuning.privacy import check_accountant
from ecogen.tuning.strategies import strategy_of


def check_recipe(recipe: recipes.Recipe) -> recipes.Recipe:
    """Check zones, the strategy, privacy's accountant, the examples, the model's folder and every cluster's placement.

    Returns the recipe with its pool's clusters formed.

    Raises:
        ConfigError: if zones (lists them all), the strategy or an edge's labels are unknown; or the accountant is
            missing.
        DataError: if the data set is missing or damaged, or has too few examples.
        CheckpointError: if the model's folder is missing, corrupt or for other images.
        PlacementError: if a cluster cannot hold the model.
    """
    if recipe.task == "serve":
        raise ConfigError(["task: this recipe serves a model; use it as `ecogen serve MODEL --recipe RECIPE`"])
    config = _announced_config(recipe.model)
    recipe = formed(recipe)
    topology = recipes.build_topology(recipe.topology)
    check_zones(site.zone for site in topology.sites.values())
    strategy_of(recipe.aggregation)
    if recipe.privacy.noise_multiplier:
        check_accountant()
    splits = load_splits(recipe.data, recipe.model.image_size, recipe.seed)
    clusters_of_edges = [len(topology.clusters_of(edge_id)) for edge_id in topology.edge_ids]
    sets = label_sets(recipe.data, topology.edge_ids, splits.num_labels)
    known = [labels.labels for labels in sets.values()]
    partition_examples(splits.train.labels, recipe.data.partition, clusters_of_edges, recipe.seed, known)
    if config is not None:
        config.num_labels = recipes.NUM_LABELS
        place_clusters(recipe, model_shape(config, recipe.tunables, recipe.wire.tokens))
    return recipe


def _announced_config(model: recipes.Model) -> ViTConfig | None:
    """The model's sizes as far as they are known without a network; the cloud checks those of the hub."""
    if model.source in recipes.MADE_HERE:
        return vit_config(model)
    if model.source.startswith("hf:"):
        return None
    config = open_foundation(Path(model.source)).config
    for name in ("image_size", "num_channels"):
        if getattr(config, name) != getattr(model, name):
            raise CheckpointError(
                f"{model.source} is a model for {name} {getattr(config, name)}, but the recipe says "
                f"{getattr(model, name)}; set model.{name}={getattr(config, name)}"
            )
    return config
