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
    Aggregation,
    Compute,
    Data,
    DeviceProfile,
    Evaluation,
    Faults,
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
    Wire,
    WireType,
)
from ecogen.config.sweep import Case, Reference, Row, Study, Sweep, load_study

__all__ = [
    "Aggregation",
    "Case",
    "Compute",
    "Data",
    "DeviceProfile",
    "Evaluation",
    "Faults",
    "LinkProfile",
    "Model",
    "NodeCompute",
    "Partition",
    "PlacementRecipe",
    "Pretraining",
    "Recipe",
    "Reference",
    "Row",
    "SiteProfile",
    "Study",
    "Sweep",
    "TopologyRecipe",
    "TransportRecipe",
    "Tunables",
    "Tuning",
    "Wire",
    "WireType",
    "build_topology",
    "builtin_names",
    "compute_of",
    "from_table",
    "load",
    "load_study",
    "section_from_table",
    "section_table",
    "to_table",
]
