"""Adapters on a tiny model that is served, and what must be answered with them."""

from __future__ import annotations

from pathlib import Path

from peft import PeftModel
from transformers import AutoModelForCausalLM

from ecogen.engines.inproc import InprocEngine
from ecogen.node.serving_edge import ServingEdge
from ecogen.serving.cluster import ServedCluster
from ecogen.serving.gateway import Gateway
from ecogen.serving.generation import GenerationRequest
from ecogen.serving.sampling import Chosen
from tests.serving.federations import GREEDY, alone

NAMES = ["one", "two", "three"]


def wanted(model: Path, adapter: Path | None, prompt: list[int], max_new: int) -> list[int]:
    whole = AutoModelForCausalLM.from_pretrained(model)
    tuned = whole if adapter is None else PeftModel.from_pretrained(whole, adapter)
    return alone(tuned.eval(), prompt, max_new)


async def asked(gateway: Gateway, name: str, prompt: list[int], max_new: int, tenant: str | None = None) -> list[int]:
    request = GenerationRequest(name, tuple(prompt), GREEDY, max_new, tenant=tenant)
    return [one.token async for one in gateway.generate(request) if isinstance(one, Chosen)]


def clusters_of(engine: InprocEngine) -> list[ServedCluster]:
    return [cluster for role in engine.roles.values() if isinstance(role, ServingEdge) for cluster in role._clusters]


def held_by(engine: InprocEngine, edge_id: str = "edge-0") -> list[str]:
    edge = engine.roles[edge_id]
    assert isinstance(edge, ServingEdge)
    return [adapter_id for cluster in edge._clusters for adapter_id in cluster.adapters]
