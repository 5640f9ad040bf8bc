"""A device's disk, memory and mail hold its own segments' tensors and no others."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import safetensors

from ecogen.config import Recipe
from ecogen.engines import inproc
from ecogen.models.vit import parameter_names
from ecogen.node.device import DeviceRole
from ecogen.placement import place, segments_held
from ecogen.runtime.delivery import Pieces
from tests.runs import finish, running
from tests.tiny import RecordingNetwork, tiny_config


@pytest.mark.parametrize(("labels", "owners"), [("start", 1), ("end", 1), ("start", 2)])
async def test_a_device_gets_and_keeps_only_its_own_segments(
    recipe_of: Callable[..., Recipe], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, labels: str, owners: int
) -> None:
    roles: dict[str, DeviceRole] = {}
    build = inproc.build_role

    def remember(context: object, *args: object, **more: object) -> object:
        roles[context.node_id] = build(context, *args, **more)
        return roles[context.node_id]

    monkeypatch.setattr(inproc, "build_role", remember)
    recipe = recipe_of(
        topology={"clusters_per_edge": 1, "devices_per_cluster": 3},
        placement={"labels": labels, "cuts": [1, 2]},
        data={"owners": owners},
        tuning={"rounds": 1},
    )
    network = RecordingNetwork()
    async with running(recipe, tmp_path, network) as (federation, _):
        await finish(federation)
    devices = [f"edge-0.cluster-0.device-{index}" for index in range(3)]
    placement = place(devices, [1, 2], 3, labels)
    for node_id in devices:
        own = set(parameter_names(tiny_config(3), segments_held(placement, owners, node_id)))
        (path,) = (tmp_path / "nodes" / node_id).glob("*.safetensors")
        with safetensors.safe_open(path, framework="pt") as file:
            assert set(file.keys()) == own
        replies = [s.message for s in network.sent if s.method == "fetch" and s.receiver_id == node_id]
        assert {piece.name for reply in replies for piece in reply.read(Pieces).pieces} == own
        resident = roles[node_id]._resident
        assert resident is not None
        in_memory = {name.replace(".base_layer", "") for name, _ in resident.stage.model.whole.named_parameters()}
        assert {name for name in in_memory if "lora_" not in name and "prompts" not in name} == own
