"""A run as one JSON object: what `ecogen run --json` prints and the report's headline shows."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean, median
from types import MappingProxyType
from typing import Any, TypedDict

from ecogen.accounting.ledger import Bounds, Ledger
from ecogen.config import Recipe
from ecogen.measurements import Drawings, InversionAttack, Probe, VersionQuality
from ecogen.placement import Placement
from ecogen.records import EventRecord, PhaseRecord, Record, RequestRecord, RoundRecord
from ecogen.reports.crossings import Crossings, crossings_of
from ecogen.reports.relay import Relay, relay_of
from ecogen.topology import Topology

NOTHING: Mapping[str, int] = MappingProxyType({})


@dataclass(frozen=True, slots=True)
class RunFacts:
    """What a report tells besides the records: sizes, wall time, host, placement and the closing measurements.

    Attributes:
        num_evaluated: on how many examples each edge was evaluated, where they know different labels.
        saved_accuracy: then, of each edge's saved model: the cloud's last average with the edge's own head.
        saved_perplexity: of a language model: of the saved one, on each edge's held-out text.
        drawings: of a text-image generator: of the saved one, of what each edge knows.
        cloud_drawings: where cloud and edges taught each other: of the cloud's, of what each edge knows.
        by_version: then of the last 12 versions of each node that lessons led to.
        data_bytes: of the images with captions that the edges' devices tuned on.
    """

    tunable_parameters: int
    total_parameters: int
    wall_s: float
    engine: str
    host: str
    versions: Mapping[str, str] = field(default_factory=dict)
    probe: Probe | None = None
    inversion: tuple[InversionAttack, ...] = ()
    placements: Mapping[str, Placement] = field(default_factory=dict)
    num_evaluated: Mapping[str, int] = field(default_factory=dict)
    saved_accuracy: Mapping[str, float] = field(default_factory=dict)
    saved_perplexity: Mapping[str, float] = field(default_factory=dict)
    drawings: Mapping[str, Drawings] = field(default_factory=dict)
    cloud_drawings: Mapping[str, Drawings] = field(default_factory=dict)
    by_version: tuple[VersionQuality, ...] = ()
    data_bytes: int = 0

    @property
    def tunable_fraction(self) -> float:
        return self.tunable_parameters / self.total_parameters if self.total_parameters else 0.0


class Accuracy(TypedDict):
    """Accuracies in [0, 1]; None where a node did not evaluate in a round.

    `first` and `last` are the first and the last of `per_round` that were measured. An edge's own figure is that of
    its aggregate before the cloud averages it.
    """

    first: float | None
    last: float | None
    per_round: list[float | None]
    per_edge: dict[str, list[float | None]]


class Perplexity(TypedDict):
    """Perplexity on an edge's held-out text; None where it was not measured.

    `delivered` is of the model that the cloud delivered, `tuned` of the edge's own aggregate after the last round,
    and `saved` of what is in the run folder: the cloud's last average.
    """

    delivered: float | None
    tuned: float | None
    saved: float | None
    per_round: list[float | None]


class Recovered(TypedDict):
    """What one attacker recovered at one depth of the cut; see `ecogen.measurements.Inversion`."""

    psnr_db: float
    baseline_psnr_db: float
    ssim: float | None
    label_accuracy: float | None


class Spent(TypedDict):
    """What tuning took from its start to the end of a round: all nodes, without pre-training, delivery and serving.

    `wall_s` is the sum over rounds of the slowest edge's.
    """

    energy_j: dict[str, float]
    sent_bytes: int
    wall_s: float


class PrivacyLoss(TypedDict):
    """What differential privacy cost, of each cluster or example; epsilon is the largest of all edges.

    `per_round` has None where no edge recorded that round. `clusters` are those of an edge.
    """

    unit: str
    epsilon: float
    edges: dict[str, float | None]
    delta: float
    per_round: list[float | None]
    noise_multiplier: float
    clip_norm: float
    participation: float
    clusters: int


class Summary(TypedDict):
    """The JSON object of a run. Bytes of kinds and link classes are payload and headers; `framing` is modelled.

    `perplexity` is by edge, of a language model; None of images. `recognised`, `copies` and `caption_accuracy` are
    shares by edge, of a text-image generator; see `ecogen.measurements.Drawings`.
    `lora_error` is the mean over rounds; None where LoRA is averaged factor by factor between clusters of equal rank.
    `inversion` is by attacker and by blocks before the cut; None where nobody attacked. `privacy` is None where no
    noise was added.
    """

    name: str
    seed: int
    engine: str
    rounds: int
    rounds_planned: int
    accuracy: Accuracy
    perplexity: dict[str, Perplexity] | None
    recognised: dict[str, float | None] | None
    copies: dict[str, float] | None
    caption_accuracy: dict[str, float] | None
    relay: Relay | None
    crossings: Crossings | None
    spent: list[Spent]
    tunable_fraction: float
    lora_error: float | None
    traffic_bytes: dict[str, int]
    flops: float
    energy_j: dict[str, float | str]
    emissions_g: float
    emissions_g_bounds: dict[str, float]
    latency_s: dict[str, float] | None
    inversion: dict[str, dict[str, Recovered]] | None
    privacy: PrivacyLoss | None
    wall_s: float
    events: list[dict[str, Any]]


def summarise(
    records: Sequence[Record], ledger: Ledger, recipe: Recipe, topology: Topology, facts: RunFacts
) -> Summary:
    """The JSON object of a run, however far it came."""
    total = ledger.total
    return {
        "name": recipe.name,
        "seed": recipe.seed,
        "engine": facts.engine,
        "rounds": len(round_indices(records)),
        "rounds_planned": recipe.tuning.rounds,
        "accuracy": accuracy(records, topology, facts.num_evaluated),
        "perplexity": perplexity(records, topology, facts) if recipe.data.is_text else None,
        "recognised": {edge: found.recognised for edge, found in facts.drawings.items()} or None,
        "copies": {edge: found.copies for edge, found in facts.drawings.items()} or None,
        "caption_accuracy": {edge: found.caption_accuracy for edge, found in facts.drawings.items()} or None,
        "relay": relay_of(records, topology, facts.data_bytes, facts.by_version),
        "crossings": crossings_of(records),
        "spent": spent(records, ledger, topology),
        "tunable_fraction": facts.tunable_fraction,
        "lora_error": _lora_error(records),
        "traffic_bytes": traffic_bytes(ledger),
        "flops": sum(usage.flops for record in records for usage in getattr(record, "usages", ())),
        "energy_j": {**_bounds(total.energy_j), "method": ledger.method},
        "emissions_g": total.emissions_g.mid,
        "emissions_g_bounds": _bounds(total.emissions_g),
        "latency_s": latency_s([record for record in records if isinstance(record, RequestRecord)]),
        "inversion": inversion(facts.inversion),
        "privacy": privacy_loss(records, recipe, topology),
        "wall_s": facts.wall_s,
        "events": [_event(record) for record in records if isinstance(record, EventRecord)],
    }


def round_indices(records: Sequence[Record]) -> range:
    """The rounds that have a record, from the first to the last."""
    indices = [record.round_index for record in records if isinstance(record, RoundRecord)]
    return range(min(indices), max(indices) + 1) if indices else range(0)


def history(
    records: Sequence[Record], node_id: str, value: Callable[[RoundRecord], float | None]
) -> list[float | None]:
    """One value a round as one node recorded it; None for the rounds it has no record of."""
    rounds = {r.round_index: value(r) for r in records if isinstance(r, RoundRecord) and r.node_id == node_id}
    return [rounds.get(index) for index in round_indices(records)]


def accuracy(records: Sequence[Record], topology: Topology, num_evaluated: Mapping[str, int] = NOTHING) -> Accuracy:
    """Accuracy by round and by edge.

    A round's is the cloud's where the cloud averaged in that round, else the mean over the edges, weighted equally.

    Args:
        num_evaluated: the weights of edges that know different labels; the cloud has no accuracy then.
    """
    per_edge = {edge: history(records, edge, lambda r: r.accuracy) for edge in topology.edge_ids}
    of_cloud = history(records, topology.cloud_id, lambda r: r.accuracy)
    of_edges = zip(*per_edge.values(), strict=True) if per_edge else ()
    weights = [num_evaluated.get(edge, 1) for edge in per_edge]
    per_round = [
        _mean(edges, weights) if cloud is None else cloud for cloud, edges in zip(of_cloud, of_edges, strict=True)
    ]
    measured = [share for share in per_round if share is not None]
    return {
        "first": measured[0] if measured else None,
        "last": measured[-1] if measured else None,
        "per_round": per_round,
        "per_edge": per_edge,
    }


def perplexity(records: Sequence[Record], topology: Topology, facts: RunFacts) -> dict[str, Perplexity]:
    """Perplexity by edge: of what it was delivered, of its aggregate round by round, and of what is saved."""
    return {edge: _perplexity(records, edge, facts.saved_perplexity.get(edge)) for edge in topology.edge_ids}


def _perplexity(records: Sequence[Record], edge_id: str, saved: float | None) -> Perplexity:
    per_round = history(records, edge_id, lambda r: r.perplexity)
    of_delivered = (r.perplexity for r in records if isinstance(r, PhaseRecord) and r.node_id == edge_id)
    delivered = next((value for value in of_delivered if value is not None), None)
    tuned = next((value for value in reversed(per_round) if value is not None), None)
    return {"delivered": delivered, "tuned": tuned, "saved": saved, "per_round": per_round}


def spent(records: Sequence[Record], ledger: Ledger, topology: Topology) -> list[Spent]:
    """What tuning had taken by the end of each round that has a record."""
    bills, sent = ledger.by_round(), ledger.sent_by_round()
    walls = {edge: history(records, edge, lambda r: r.wall_s) for edge in topology.edge_ids}
    energy_j, num_bytes, wall_s = Bounds(0.0, 0.0, 0.0), 0, 0.0
    lines: list[Spent] = []
    for place, index in enumerate(round_indices(records)):
        energy_j += bills[index].energy_j if index in bills else Bounds(0.0, 0.0, 0.0)
        num_bytes += sent.get(index, 0)
        wall_s += max((edge[place] or 0.0 for edge in walls.values()), default=0.0)
        lines.append({"energy_j": _bounds(energy_j), "sent_bytes": num_bytes, "wall_s": wall_s})
    return lines


def traffic_bytes(ledger: Ledger) -> dict[str, int]:
    """Bytes by kind and by link class, as the codec wrote them, and beside them the modelled framing.

    What went to an operator outside the federation is in its kind but in no link class.
    """
    sums: dict[str, int] = {str(kind): sent for kind, sent in ledger.traffic_by_kind().items()}
    sums |= {str(link): sent for link, sent in ledger.traffic_by_link().items()}
    return sums | {"framing": ledger.framing_bytes}


def latency_s(requests: Sequence[RequestRecord]) -> dict[str, float] | None:
    """Medians over requests of each part and of the total (medians, so the parts need not add up); None without any."""
    if not requests:
        return None
    return {
        "t_ul": median(request.t_ul_s for request in requests),
        "t_inference": median(request.t_inference_s for request in requests),
        "t_dl": median(request.t_dl_s for request in requests),
        "total": median(request.latency_s for request in requests),
    }


def inversion(attacks: Sequence[InversionAttack]) -> dict[str, dict[str, Recovered]] | None:
    """What was recovered, by attacker and by blocks before the cut (as words, for JSON); None without an attack."""
    recovered: dict[str, dict[str, Recovered]] = {
        attack.attacker: {
            str(result.blocks_before): {
                "psnr_db": result.psnr_db,
                "baseline_psnr_db": result.baseline_psnr_db,
                "ssim": result.ssim,
                "label_accuracy": result.label_accuracy,
            }
            for result in attack.results
        }
        for attack in attacks
    }
    return recovered or None


def privacy_loss(records: Sequence[Record], recipe: Recipe, topology: Topology) -> PrivacyLoss | None:
    """Epsilon by round, of the edge that spent most; None where nothing was private."""
    per_edge = [history(records, edge, lambda r: r.epsilon) for edge in topology.edge_ids]
    per_round = [max((e for e in edges if e is not None), default=None) for edges in zip(*per_edge, strict=True)]
    measured = [epsilon for epsilon in per_round if epsilon is not None]
    if not measured:
        return None
    spent = ([epsilon for epsilon in edge if epsilon is not None] for edge in per_edge)
    return {
        "unit": recipe.privacy.unit,
        "epsilon": max(measured),
        "edges": {edge: max(own, default=None) for edge, own in zip(topology.edge_ids, spent, strict=True)},
        "delta": recipe.privacy.delta,
        "per_round": per_round,
        "noise_multiplier": recipe.privacy.noise_multiplier,
        "clip_norm": recipe.privacy.clip_norm,
        "participation": recipe.tuning.participation,
        "clusters": max(len(topology.clusters_of(edge)) for edge in topology.edge_ids),
    }


def _lora_error(records: Sequence[Record]) -> float | None:
    errors = [r.lora_error for r in records if isinstance(r, RoundRecord) and r.lora_error is not None]
    return fmean(errors) if errors else None


def _mean(values: Sequence[float | None], weights: Sequence[int]) -> float | None:
    measured = [(value, weight) for value, weight in zip(values, weights, strict=True) if value is not None]
    return fmean(*zip(*measured, strict=True)) if sum(weight for _, weight in measured) else None


def _bounds(bounds: Bounds) -> dict[str, Any]:
    return {"low": bounds.low, "mid": bounds.mid, "high": bounds.high}


def _event(record: EventRecord) -> dict[str, Any]:
    return {
        "event": record.event,
        "node_id": record.node_id,
        "round_index": record.round_index,
        "detail": record.detail,
        "time_s": record.time_s,
    }
