"""Which role a node has."""

from __future__ import annotations

from pathlib import Path

from ecogen.config import Recipe
from ecogen.errors import ConfigError
from ecogen.node.cloud import CloudRole
from ecogen.node.context import NodeContext, Role
from ecogen.node.device import DeviceRole
from ecogen.node.edge import EdgeRole
from ecogen.node.serving_cloud import ServingCloud
from ecogen.node.serving_device import ServingDevice
from ecogen.node.serving_edge import ServingEdge
from ecogen.topology import Tier
from ecogen.tuning.foundation import obtain_foundation


def build_role(
    context: NodeContext,
    tier: str,
    parent_id: str | None,
    recipe: Recipe | None = None,
    tuned: Path | None = None,
    *,
    serves: bool = False,
) -> Role:
    """The role of a tier. Only the cloud needs the recipe: edges and devices are told by their parents.

    Args:
        tuned: for the cloud of a federation that only serves: the tunables.
        serves: a language model, in a federation that tunes nothing.

    Raises:
        ConfigError: if the cloud has no recipe, or another node no parent.
    """
    if tier == Tier.CLOUD and recipe is not None:
        if serves:
            return ServingCloud(context, recipe)
        return CloudRole(context, recipe, obtain_foundation, tuned=tuned)
    if tier == Tier.EDGE and parent_id is not None:
        return (ServingEdge if serves else EdgeRole)(context, parent_id)
    if tier == Tier.END and parent_id is not None:
        return (ServingDevice if serves else DeviceRole)(context, parent_id)
    need = "a recipe" if tier == Tier.CLOUD else "a parent to join"
    raise ConfigError([f"a node of tier {tier!r} needs {need}"], context.node_id)
