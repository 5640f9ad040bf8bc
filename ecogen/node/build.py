"""Which role a node of the topology has."""

from __future__ import annotations

from pathlib import Path

from ecogen import config as recipes
from ecogen.node.cloud import CloudRole
from ecogen.node.context import NodeContext, Role
from ecogen.node.device import DeviceRole
from ecogen.node.edge import EdgeRole
from ecogen.topology import Tier
from ecogen.tuning.foundation import obtain_foundation


def build_role(context: NodeContext, recipe: recipes.Recipe, tuned: Path | None = None) -> Role:
    """The role of a node, from the recipe's topology alone: edges and devices are told the rest by their parents.

    Args:
        tuned: for the cloud of a federation that only serves: the tunables.
    """
    topology = recipes.build_topology(recipe.topology)
    node, parent_id = topology.nodes[context.node_id], topology.parent_of(context.node_id)
    if node.tier is Tier.CLOUD:
        return CloudRole(context, recipe, obtain_foundation, tuned=tuned)
    assert parent_id is not None
    if node.tier is Tier.EDGE:
        return EdgeRole(context, parent_id)
    return DeviceRole(context, parent_id)
