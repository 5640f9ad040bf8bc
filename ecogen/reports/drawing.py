"""The topology as a drawing: the cloud, its edges, their clusters, and what each device holds of the model.

A device shows the whole model as a row of cells, the embedding, the blocks and the head, with those it holds filled:
so the cells of a cluster, read together, are one copy of the model. Units are CSS pixels, y grows downwards.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch, Rectangle

from ecogen.placement import Placement, Segment
from ecogen.reports.svg import GRID, INK, MUTED, SURFACE, TIER_COLORS, render
from ecogen.reports.wording import plural, short_id, shorten
from ecogen.topology import Cluster, Link, Tier, Topology
from ecogen.units import format_seconds

_MAX_EDGES, _MAX_CLUSTERS, _MAX_DEVICES = 4, 6, 6
_LEFT, _RIGHT, _GAP = 12.0, 4.0, 24.0
_CLOUD_Y, _EDGE_Y, _CLUSTERS_Y, _CLUSTER_HEIGHT, _ROW_GAP = 26.0, 108.0, 140.0, 84.0, 12.0
_MAX_CELLS = 16  # a model of more blocks is drawn as one bar with the held ranges filled


@dataclass(frozen=True, slots=True)
class _Column:
    """The strip of the drawing that belongs to one edge."""

    left: float
    width: float

    @property
    def middle(self) -> float:
        return self.left + self.width / 2


def draw_topology(topology: Topology, placements: Mapping[str, Placement]) -> str:
    """The topology with the segments of each device; of a large one, its first edges, clusters and devices.

    Args:
        placements: cluster id -> placement; a cluster that is not in it is drawn without segments.
    """
    edges = topology.edge_ids[:_MAX_EDGES]
    width = max(860.0, 300.0 * len(edges))
    rows = max((len(topology.clusters_of(edge)[:_MAX_CLUSTERS]) for edge in edges), default=0)
    crowded = any(len(topology.clusters_of(edge)) > _MAX_CLUSTERS for edge in edges)
    height = _CLUSTERS_Y + rows * (_CLUSTER_HEIGHT + _ROW_GAP) + (20 if crowded else 0)

    def paint(figure: Figure) -> None:
        axes = _canvas(figure, width, height)
        columns = _columns(len(edges), width)
        _cloud(axes, topology, width / 2, columns)
        for edge, column in zip(edges, columns, strict=True):
            _edge(axes, topology, edge, column, placements)

    label = (
        f"Topology: the cloud, {plural(len(topology.edge_ids), 'edge')}, {plural(len(topology.clusters), 'cluster')}"
    )
    label += f" and {plural(len(topology.end_ids), 'device')}; the placement table says the same in words"
    return render(paint, name="topology", label=label, width=round(width), height=round(height), layout=None)


def hidden_parts(topology: Topology) -> str:
    """What the drawing leaves out, as a sentence; empty if it shows everything."""
    edges = topology.edge_ids
    clusters = max((len(topology.clusters_of(edge)) for edge in edges), default=0)
    devices = max((len(cluster.node_ids) for cluster in topology.clusters.values()), default=0)
    parts = [
        f"{limit} of {count} {noun}"
        for count, limit, noun in (
            (len(edges), _MAX_EDGES, "edges"),
            (clusters, _MAX_CLUSTERS, "clusters an edge"),
            (devices, _MAX_DEVICES, "devices a cluster"),
        )
        if count > limit
    ]
    return f"The drawing shows {', '.join(parts)}." if parts else ""


def _canvas(figure: Figure, width: float, height: float) -> Axes:
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set_xlim(0, width)
    axes.set_ylim(height, 0)
    axes.set_axis_off()
    return axes


def _columns(count: int, width: float) -> list[_Column]:
    each = (width - _LEFT - _RIGHT - (count - 1) * _GAP) / max(count, 1)
    return [_Column(_LEFT + index * (each + _GAP), each) for index in range(count)]


def _cloud(axes: Axes, topology: Topology, x: float, columns: Sequence[_Column]) -> None:
    for column in columns:
        axes.plot([x, column.middle], [_CLOUD_Y + 17, _EDGE_Y - 15], color=MUTED, linewidth=1.2, zorder=0)
    if columns:
        middle = (_CLOUD_Y + _EDGE_Y) / 2 + 1
        _on_line(
            axes, x, middle, f"{plural(len(topology.edge_ids), 'edge')}, {_describe(topology.links['cloud_edge'])}"
        )
    _box(axes, x - 80, _CLOUD_Y - 17, 160, 34, TIER_COLORS[Tier.CLOUD])
    _words(axes, x, _CLOUD_Y, topology.cloud_id, size=12.5)


def _edge(axes: Axes, topology: Topology, edge: str, column: _Column, placements: Mapping[str, Placement]) -> None:
    clusters = topology.clusters_of(edge)
    shown = clusters[:_MAX_CLUSTERS]
    axes.plot([column.left - 8] * 2, [_EDGE_Y, _top(len(shown) - 1) + 12], color=MUTED, linewidth=1.2, zorder=0)
    axes.plot([column.left - 8, column.middle - 60], [_EDGE_Y] * 2, color=MUTED, linewidth=1.2, zorder=0)
    _box(axes, column.middle - 60, _EDGE_Y - 15, 120, 30, TIER_COLORS[Tier.EDGE])
    _words(axes, column.middle, _EDGE_Y, edge, size=12)
    for row, cluster in enumerate(shown):
        _cluster(axes, cluster, column, _top(row), placements.get(cluster.cluster_id))
    if len(clusters) > len(shown):
        _words(axes, column.middle, _top(len(shown)) + 6, f"and {len(clusters) - len(shown)} more", color=MUTED)


def _top(rows: int) -> float:
    """Where the cluster after so many others begins."""
    return _CLUSTERS_Y + rows * (_CLUSTER_HEIGHT + _ROW_GAP)


def _cluster(axes: Axes, cluster: Cluster, column: _Column, top: float, placement: Placement | None) -> None:
    axes.plot([column.left - 8, column.left], [top + 12] * 2, color=MUTED, linewidth=1.2, zorder=0)
    _box(axes, column.left, top, column.width, _CLUSTER_HEIGHT, GRID, fill=False)
    _words(axes, column.left + 8, top + 12, short_id(cluster.cluster_id), ha="left", color=MUTED)
    shown = cluster.node_ids[:_MAX_DEVICES]
    if len(cluster.node_ids) > len(shown):
        more = f"and {len(cluster.node_ids) - len(shown)} more"
        _words(axes, column.left + column.width - 8, top + 12, more, ha="right", color=MUTED)
    gap = 10.0
    width = (column.width - 16 - (len(shown) - 1) * gap) / len(shown)
    lefts = [column.left + 8 + index * (width + gap) for index in range(len(shown))]
    for left, following in pairwise(lefts):
        axes.plot([left + width, following], [top + 51] * 2, color=TIER_COLORS[Tier.END], linewidth=1.6)
    for left, node_id in zip(lefts, shown, strict=True):
        _device(axes, node_id, left, top + 24, width, placement)


def _device(axes: Axes, node_id: str, left: float, top: float, width: float, placement: Placement | None) -> None:
    _box(axes, left, top, width, 52, TIER_COLORS[Tier.END])
    _words(axes, left + width / 2, top + 12, short_id(node_id), size=10)
    if placement is None or node_id not in placement.node_ids:
        return
    segments = placement.segments_of(node_id)
    _cells(axes, segments, placement.num_blocks, left + 6, top + 22, width - 12)
    _words(axes, left + width / 2, top + 42, shorthand(segments), size=9.5, color=MUTED)


def shorthand(segments: Sequence[Segment]) -> str:
    """What a device holds, in a few characters: `'E 0-1 H'` for embedding, blocks 0 and 1, and head."""
    parts = ["E"] * any(segment.has_embedding for segment in segments)
    parts += [_span(segment) for segment in segments if len(segment)]
    parts += ["H"] * any(segment.has_head for segment in segments)
    return " ".join(parts)


def _span(segment: Segment) -> str:
    return str(segment.start) if len(segment) == 1 else f"{segment.start}\N{EN DASH}{segment.stop - 1}"


def _cells(axes: Axes, segments: Sequence[Segment], num_blocks: int, left: float, top: float, width: float) -> None:
    """Embedding, blocks and head as cells, the held ones filled."""
    held = {block + 1 for segment in segments for block in segment.blocks}
    held |= {0 for segment in segments if segment.has_embedding}
    held |= {num_blocks + 1 for segment in segments if segment.has_head}
    each = width / (num_blocks + 2)
    inset = 0.75 if num_blocks <= _MAX_CELLS else 0.0
    for cell in range(num_blocks + 2):
        face = TIER_COLORS[Tier.END] if cell in held else GRID
        axes.add_patch(Rectangle((left + cell * each + inset, top), each - 2 * inset, 9, facecolor=face, linewidth=0))


def _describe(link: Link) -> str:
    return f"{format_seconds(link.rtt_s)} round trip, {link.bytes_per_s * 8 / 1e6:g} Mbit/s"


def _box(axes: Axes, left: float, top: float, width: float, height: float, color: str, *, fill: bool = True) -> None:
    for face, alpha in ((SURFACE, 1.0), (color, 0.12)) if fill else ((SURFACE, 1.0),):
        box = FancyBboxPatch((left, top), width, height, boxstyle="round,pad=0,rounding_size=6", linewidth=0)
        box.set(facecolor=face, alpha=alpha)
        axes.add_patch(box)
    outline = FancyBboxPatch((left, top), width, height, boxstyle="round,pad=0,rounding_size=6", linewidth=1.2)
    outline.set(facecolor="none", edgecolor=color)
    axes.add_patch(outline)


def _on_line(axes: Axes, x: float, y: float, text: str) -> None:
    """Words across lines, which they hide."""
    axes.text(x, y, text, ha="center", va="center", fontsize=10, color=MUTED, bbox=_PATCH)


_PATCH = {"facecolor": SURFACE, "edgecolor": "none", "pad": 3}


def _words(
    axes: Axes, x: float, y: float, text: str, *, size: float = 10.5, color: str = INK, ha: str = "center"
) -> None:
    axes.text(x, y, shorten(text), ha=ha, va="center", fontsize=size, color=color)
