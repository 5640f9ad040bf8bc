"""What is served: a model's folder or a run's, adapters beside it, and the recipe that has nodes serve it."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from ecogen import config as recipes
from ecogen.accounting.intensity import check_zones
from ecogen.engines.run_folder import check_ended, load_recipe
from ecogen.errors import CheckpointError
from ecogen.models.adapters import ADAPTER, BACKBONE, EDGES
from ecogen.models.decoder import open_config
from ecogen.models.folder import CONFIG, open_folder
from ecogen.planning.decoding import place_decoder
from ecogen.serving.generation import ServedModel
from ecogen.serving.language import LanguageModel
from ecogen.serving.semantic import calibration_of


@dataclass(frozen=True)
class Served:
    """What is to be served.

    Attributes:
        folder: of the backbone.
        name: of the backbone.
        adapters: folders, by the name under which each is asked for.
    """

    folder: Path
    name: str
    adapters: Mapping[str, Path] = field(default_factory=dict)

    def beside(self, adapters: Mapping[str, Path]) -> Served:
        """With more adapters.

        Raises:
            CheckpointError: if one has a name that is there already.
        """
        _check_once([self.name, *self.adapters, *adapters])
        return replace(self, adapters={**self.adapters, **adapters})


def find_served(path: Path) -> Served:
    """What a folder holds: a model that `save_pretrained` wrote, or a run that tuned one.

    A run's backbone goes by the name of `RUN/backbone`, its tuned model by that of the run, and an edge's own by that
    of the run and the edge.

    Raises:
        CheckpointError: if it is neither, or a model that cannot be served.
        RunError: if it is a run that has not finished.
    """
    if (path / CONFIG).exists():
        _check_decoder(path)
        return Served(path, path.resolve().name)
    if not (path / BACKBONE / CONFIG).exists():
        check_ended(path)
        raise CheckpointError(
            f"{path} holds no model: give a folder that save_pretrained wrote, or a finished run, say of the recipe "
            "text or pairs"
        )
    _check_decoder(path / BACKBONE)
    name = load_recipe(path).name
    found = {name: path / ADAPTER}
    found |= {f"{name}/{edge.name}": edge / ADAPTER for edge in sorted((path / EDGES).glob("*"))}
    return Served(path / BACKBONE, f"{name}/{BACKBONE}", {n: f for n, f in found.items() if f.exists()})


def _check_decoder(path: Path) -> None:
    """See that a folder holds a decoder.

    Raises:
        CheckpointError: if not.
    """
    if open_folder(path).config.get("model_type") == "vit":
        raise CheckpointError(f"{path} holds a classifier of images; only decoders are served and draw")
    open_config(path)


def name_of(folder: Path) -> str:
    """Of the model in a folder; a run's backbone is called by the run's folder too."""
    return f"{folder.parent.name}/{BACKBONE}" if folder.name == BACKBONE else folder.name


def adapters_of(named: Sequence[str]) -> dict[str, Path]:
    """Adapters by name, of `NAME=DIR` each.

    Raises:
        CheckpointError: if one is not written so, or two have the same name.
    """
    pairs = [text.partition("=") for text in named]
    if wrong := [text for text, (name, _, folder) in zip(named, pairs, strict=True) if not (name and folder)]:
        raise CheckpointError(f"{wrong[0]!r} is not NAME=DIR, for example --adapter poems=adapters/poems")
    _check_once([name for name, _, _ in pairs])
    return {name: Path(folder) for name, _, folder in pairs}


def _check_once(names: Sequence[str]) -> None:
    if twice := [name for name, number in Counter(names).items() if number > 1]:
        raise CheckpointError(f"the name {twice[0]!r} is given twice; give each adapter a name of its own")


def serving_recipe(model: Path, recipe: recipes.Recipe | None = None, **sections: object) -> recipes.Recipe:
    """The recipe that serves the model in a folder.

    Args:
        recipe: what to change; None for the built-in one, with all nodes in this process.
        sections: of the recipe that are given instead.
    """
    base = recipe or recipes.load("serve", ["engine=inproc"])
    source = replace(base.model, source=str(model.resolve()))
    return replace(base, task="serve", model=source, **sections)  # type: ignore[arg-type]


def check_serving(recipe: recipes.Recipe, name: str | None = None) -> ServedModel:
    """What would be served, if every cluster can hold it with all of its devices.

    Raises:
        CheckpointError, PlacementError, ConfigError, ServingError: as `launch_serving`.
    """
    path = Path(recipe.model.source)
    topology = recipes.build_topology(recipe.topology)
    check_zones(site.zone for site in topology.sites.values())
    if recipe.serving.semantic.answers:
        calibration_of(recipe.serving.semantic)
    folder = open_folder(path)
    max_tokens = LanguageModel(folder).max_tokens(recipe.serving.max_tokens)
    for cluster in topology.clusters.values():
        nodes = [topology.nodes[node_id] for node_id in cluster.node_ids]
        model = LanguageModel(folder, [recipes.compute_of(recipe, node.node_id).dtype for node in nodes])
        place_decoder(
            model.weights((recipe.serving.slots + recipe.serving.shelf) * len(nodes), max_tokens),
            nodes,
            recipe.placement.labels,
        )
    return ServedModel(name or path.name, time.time(), max_tokens, nbytes=folder.nbytes)
