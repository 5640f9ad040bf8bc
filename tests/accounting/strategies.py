"""Made-up federations and records for the ledger's tests."""

from __future__ import annotations

from hypothesis import strategies as st

from ecogen.config import SiteProfile, TopologyRecipe, build_topology
from ecogen.records import KINDS, EventRecord, PhaseRecord, Record, RequestRecord, RoundRecord, Traffic, Usage

OPERATOR = "operator"
SITES = {"cloud": SiteProfile("US", 1.1), "edge-0": SiteProfile("FR", 1.3), "edge-0.field": SiteProfile("FR")}
TOPOLOGY = build_topology(TopologyRecipe(edges=2, clusters_per_edge=1, devices_per_cluster=2, sites=SITES))
NODES = sorted(TOPOLOGY.nodes)

_seconds = st.floats(0, 1e4)
_count = st.integers(0, 10**9)

traffics = st.builds(
    Traffic,
    receiver_id=st.sampled_from([*NODES, OPERATOR]),
    kind=st.sampled_from(KINDS),
    messages=st.integers(1, 1000),
    payload_bytes=_count,
    header_bytes=_count,
    framing_bytes=_count,
)
usages = st.builds(
    Usage,
    node_id=st.sampled_from(NODES),
    phase=st.sampled_from(["delivery", "tuning", "evaluation", "serving"]),
    wall_s=_seconds,
    cpu_s=_seconds,
    flops=st.floats(0, 1e15),
    memory_bytes=_count,
    traffic=st.lists(traffics, max_size=3).map(tuple),
    method=st.sampled_from(["measured", "modelled"]),
)
_several = st.lists(usages, max_size=3).map(tuple)
_rounds = _several.flatmap(
    lambda usages: st.integers(0, 3).map(lambda index: RoundRecord("edge-0", index, None, None, 1, (), (), 1.0, usages))
)
_phases = _several.map(lambda usages: PhaseRecord("cloud", "delivery", 1.0, usages))
_requests = _several.map(lambda usages: RequestRecord("r", "edge-0.cluster-0", 1, 0.0, 0.0, 0.0, (), usages))
_events = st.just(EventRecord("joined", "cloud"))

records: st.SearchStrategy[list[Record]] = st.lists(st.one_of(_rounds, _phases, _requests, _events), max_size=4)
