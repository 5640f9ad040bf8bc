"""Recipes: TOML in, frozen values out, all problems in one error.

Reading a recipe touches no network, disk (beyond the recipe itself) or device.
"""

from ecogen.config.nodes import build_topology, compute_of
from ecogen.config.reading import (
    builtin_names,
    from_table,
    load,
    section_from_table,
    section_table,
    to_table,
)
from ecogen.config.schema import (
    Compute,
    Data,
    DeviceProfile,
    Evaluation,
    LinkProfile,
    Model,
    NodeCompute,
    Partition,
    PlacementRecipe,
    Pretraining,
    Recipe,
    SiteProfile,
    TopologyRecipe,
    TransportRecipe,
    Tunables,
    Tuning,
)

__all__ = [
    "Compute",
    "Data",
    "DeviceProfile",
    "Evaluation",
    "LinkProfile",
    "Model",
    "NodeCompute",
    "Partition",
    "PlacementRecipe",
    "Pretraining",
    "Recipe",
    "SiteProfile",
    "TopologyRecipe",
    "TransportRecipe",
    "Tunables",
    "Tuning",
    "build_topology",
    "builtin_names",
    "compute_of",
    "from_table",
    "load",
    "section_from_table",
    "section_table",
    "to_table",
]
