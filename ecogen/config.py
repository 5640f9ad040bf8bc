"""Recipes: TOML in, frozen values out, all problems in one error.

Reading a recipe touches no network, disk (beyond the recipe itself) or device. Only the top verbs see a `Recipe`;
components take plain arguments.
"""

from __future__ import annotations

import dataclasses
import difflib
import re
import tomllib
import typing
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import field
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from ecogen.errors import ConfigError
from ecogen.placement import Labels
from ecogen.records import LinkClass
from ecogen.topology import Cluster, Device, Link, Node, Site, Tier, Topology
from ecogen.units import GB, GIB, MBIT_PER_S_IN_BYTES_PER_S

_STRICT = ConfigDict(extra="forbid")

Count = Annotated[int, Field(ge=1)]
Natural = Annotated[int, Field(ge=0)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NonNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Share = Annotated[float, Field(ge=0, le=1)]
DeviceName = Annotated[str, Field(pattern=r"^(auto|cpu|mps|cuda(:\d+)?)$")]
DtypeName = Literal["float32", "bfloat16"]


@dataclass(frozen=True, config=_STRICT)
class Model:
    """The foundation model: a vision transformer, made and pre-trained in the cloud, or loaded from a folder or hub."""

    source: str = "pretrain"  # "pretrain", a folder written by save_pretrained, or "hf:<repository>"
    hidden_size: Count = 128
    num_blocks: Count = 4
    num_heads: Count = 4
    intermediate_size: Count = 256
    image_size: Count = 28
    patch_size: Count = 7
    num_channels: Count = 1


@dataclass(frozen=True, config=_STRICT)
class Pretraining:
    """How the cloud pre-trains the foundation model on unlabelled glyphs."""

    seed: int = 0
    options: Mapping[str, float] = field(default_factory=dict)  # keyword arguments of `tuning.pretrain.pretrain`


@dataclass(frozen=True, config=_STRICT)
class Partition:
    """How training examples are divided: first over edges, then over the clusters of an edge."""

    across_edges: Literal["iid", "dirichlet"] = "dirichlet"
    within_edge: Literal["iid", "dirichlet"] = "iid"
    alpha: Positive = 0.5  # concentration of the Dirichlet draw; small is uneven (Hsu et al. 2019)


@dataclass(frozen=True, config=_STRICT)
class Data:
    """Which labelled examples the devices own."""

    name: Literal["digits"] = "digits"
    train: Count = 1200
    validation: Natural = 147
    owners: Count = 1  # devices of each cluster that own data; they take turns as the start, an epoch each
    partition: Partition = field(default_factory=Partition)


@dataclass(frozen=True, config=_STRICT)
class SiteProfile:
    """Where nodes stand. Zones are those of `accounting.intensity`."""

    zone: str = "WORLD"
    pue: Annotated[float, Field(ge=1)] = 1.0


@dataclass(frozen=True, config=_STRICT)
class DeviceProfile:
    """Hardware of the nodes of a tier, or of one node."""

    memory_gib: Positive = 4.0
    gflops: Positive = 50.0
    idle_w: NonNegative = 0.74
    busy_w: Positive = 2.28


@dataclass(frozen=True, config=_STRICT)
class LinkProfile:
    """A class of links."""

    rtt_ms: NonNegative
    mbit_per_s: Positive


@dataclass(frozen=True, config=_STRICT)
class TopologyRecipe:
    """A cloud, edges, clusters and devices, by number, with profiles by tier and exceptions by node id.

    Power: Cloud Carbon Footprint's coefficients of an EPYC gen 4 vCPU, 0.74 W idle and 2.28 W busy, since the
    nodes of a run on one machine are its threads; give the watts of your own devices.
    Round-trip times: cloud 30-50 ms, edge below 10 ms (Table 1 of the overview paper), D2D as within a Wi-Fi cell.
    """

    edges: Count = 2
    clusters_per_edge: Count = 3
    devices_per_cluster: Count = 3
    sites: Mapping[str, SiteProfile] = field(default_factory=dict)
    cloud: DeviceProfile = field(default_factory=lambda: DeviceProfile(memory_gib=64))
    edge: DeviceProfile = field(default_factory=lambda: DeviceProfile(memory_gib=16))
    end: DeviceProfile = field(default_factory=lambda: DeviceProfile(memory_gib=4))
    devices: Mapping[str, DeviceProfile] = field(default_factory=dict)
    cloud_edge: LinkProfile = field(default_factory=lambda: LinkProfile(rtt_ms=40, mbit_per_s=1000))
    edge_end: LinkProfile = field(default_factory=lambda: LinkProfile(rtt_ms=8, mbit_per_s=200))
    d2d: LinkProfile = field(default_factory=lambda: LinkProfile(rtt_ms=4, mbit_per_s=300))


@dataclass(frozen=True, config=_STRICT)
class PlacementRecipe:
    """Where the model is cut, and where the labels are."""

    labels: Labels = "start"
    cuts: Literal["auto"] | tuple[Count, ...] = "auto"


@dataclass(frozen=True, config=_STRICT)
class NodeCompute:
    """What one node computes on."""

    device: DeviceName = "cpu"
    dtype: DtypeName = "float32"


@dataclass(frozen=True, config=_STRICT)
class Compute:
    """What the nodes compute on; `nodes` overrides by node id."""

    device: DeviceName = "cpu"
    dtype: DtypeName = "float32"
    nodes: Mapping[str, NodeCompute] = field(default_factory=dict)


@dataclass(frozen=True, config=_STRICT)
class Tunables:
    """What trains and travels; the backbone is frozen."""

    prompts: Natural = 4  # deep visual prompts a block (VPT-deep, Jia et al. 2022)
    lora_rank: Natural = 4
    lora_alpha: Positive = 8.0
    lora_targets: tuple[str, ...] = ("q_proj", "v_proj")
    head: bool = True
    first_block: Natural = 0  # prompts and LoRA from this block upwards; no gradient flows below the lowest tunable


@dataclass(frozen=True, config=_STRICT)
class Tuning:
    """Hybrid federated split learning."""

    rounds: Count = 8
    local_epochs: Natural = 2
    batch_size: Count = 25
    microbatches: Count = 2
    learning_rate: Positive = 8e-3
    learning_rate_decay: Annotated[float, Field(gt=0, le=1)] = 0.75  # factor a round
    weight_decay: NonNegative = 0.01
    clip_norm: NonNegative = 1.0  # 0 turns clipping off
    augmentation: Share = 0.5  # strength of random shifts, rotations and scales on the device
    cloud_every: Natural = 1  # edge rounds between two averagings in the cloud (T_e); 0: edges stay alone
    round_timeout_s: Positive = 600.0
    rejoin_timeout_s: Positive = 120.0


@dataclass(frozen=True, config=_STRICT)
class Evaluation:
    """What is measured besides tuning."""

    split: Literal["test", "validation", "none"] = "test"
    requests: Natural = 20  # requests through the split chain of each edge once the model is tuned
    inversion: bool = False  # attack what crosses the first cut, and report how much it recovers


@dataclass(frozen=True, config=_STRICT)
class Recipe:
    """A complete run."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9._-]+$")] = "run"
    seed: Natural = 0
    engine: Literal["inproc", "local"] = "inproc"
    model: Model = field(default_factory=Model)
    pretraining: Pretraining = field(default_factory=Pretraining)
    data: Data = field(default_factory=Data)
    topology: TopologyRecipe = field(default_factory=TopologyRecipe)
    placement: PlacementRecipe = field(default_factory=PlacementRecipe)
    compute: Compute = field(default_factory=Compute)
    tunables: Tunables = field(default_factory=Tunables)
    tuning: Tuning = field(default_factory=Tuning)
    evaluation: Evaluation = field(default_factory=Evaluation)


SectionType = typing.TypeVar("SectionType")

_RECIPE: TypeAdapter[Recipe] = TypeAdapter(Recipe)


def load(source: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """The recipe of a built-in name or a TOML path.

    Args:
        source: `"digits"`, say, or a path.
        overrides: `"a.b=value"` each, with the value as TOML or else a bare string.

    Raises:
        ConfigError: with every problem and its place.
    """
    text, name = _read(source)
    try:
        table = tomllib.loads(text)
    except tomllib.TOMLDecodeError as problem:
        raise ConfigError([f"not TOML: {problem}"], name) from problem
    for override in overrides:
        _override(table, override)
    if any(override.strip().startswith(_COUNTS) for override in overrides):
        _drop_beyond(table)
    return from_table(table, name)


def from_table(table: Mapping[str, Any], source: str = "recipe") -> Recipe:
    """A recipe from nested dictionaries, validated in one pass.

    Raises:
        ConfigError: with every problem and its place.
    """
    try:
        recipe = _RECIPE.validate_python(table)
    except ValidationError as error:
        raise ConfigError([_explain(problem) for problem in error.errors()], source) from None
    problems = list(_contradictions(recipe))
    if problems:
        raise ConfigError(problems, source)
    return recipe


def to_table(recipe: Recipe) -> dict[str, Any]:
    """The resolved recipe as nested dictionaries, every default filled in."""
    table: dict[str, Any] = _RECIPE.dump_python(recipe, mode="json")
    return table


def section_table(section: Any) -> dict[str, Any]:
    """One section as a dictionary, every default filled in."""
    table: dict[str, Any] = TypeAdapter(type(section)).dump_python(section, mode="json")
    return table


def section_from_table(section_type: type[SectionType], table: Mapping[str, Any]) -> SectionType:
    """One section from a dictionary.

    Raises:
        ConfigError: with every problem and its place.
    """
    try:
        return TypeAdapter(section_type).validate_python(table)
    except ValidationError as error:
        raise ConfigError([_explain(problem) for problem in error.errors()], section_type.__name__) from None


def builtin_names() -> list[str]:
    """The recipes that come with EcoGen."""
    files = (resources.files("ecogen") / "recipes").iterdir()
    return sorted(file.name.removesuffix(".toml") for file in files if file.name.endswith(".toml"))


def build_topology(recipe: TopologyRecipe) -> Topology:
    """Nodes `cloud`, `edge-0`, `edge-0.cluster-1.device-2` and so on, with their sites, devices and links."""
    sites: dict[str, Site] = {}
    nodes: dict[str, Node] = {}
    clusters: dict[str, Cluster] = {}

    def add(node_id: str, tier: Tier, site_id: str) -> None:
        profile = recipe.sites.get(site_id, SiteProfile())
        sites.setdefault(site_id, Site(site_id, profile.zone, profile.pue))
        default: DeviceProfile = getattr(recipe, tier.value)
        nodes[node_id] = Node(node_id, tier, site_id, _device(recipe.devices.get(node_id, default)))

    add("cloud", Tier.CLOUD, "cloud")
    for edge in (f"edge-{index}" for index in range(recipe.edges)):
        add(edge, Tier.EDGE, edge)
        for cluster in (f"{edge}.cluster-{index}" for index in range(recipe.clusters_per_edge)):
            ids = tuple(f"{cluster}.device-{index}" for index in range(recipe.devices_per_cluster))
            clusters[cluster] = Cluster(cluster, edge, ids)
            for node_id in ids:
                add(node_id, Tier.END, f"{edge}.field")
    return Topology(sites, nodes, _links(recipe), clusters)


def compute_of(recipe: Recipe, node_id: str) -> NodeCompute:
    """What a node computes on."""
    return recipe.compute.nodes.get(node_id, NodeCompute(recipe.compute.device, recipe.compute.dtype))


def _device(profile: DeviceProfile) -> Device:
    return Device(int(profile.memory_gib * GIB), profile.gflops * GB, profile.idle_w, profile.busy_w)


def _links(recipe: TopologyRecipe) -> dict[LinkClass, Link]:
    profiles: dict[LinkClass, LinkProfile] = {
        "cloud_edge": recipe.cloud_edge,
        "edge_end": recipe.edge_end,
        "d2d": recipe.d2d,
    }
    return {
        name: Link(name, profile.rtt_ms / 1e3, profile.mbit_per_s * MBIT_PER_S_IN_BYTES_PER_S)
        for name, profile in profiles.items()
    }


def _read(source: str | Path) -> tuple[str, str]:
    """Text and a name for messages. A bare name is a built-in recipe; anything else is a path."""
    if str(source) in builtin_names():
        return (resources.files("ecogen") / "recipes" / f"{source}.toml").read_text(), f"recipe {source!r}"
    try:
        return Path(source).read_text(), str(source)
    except (OSError, UnicodeDecodeError) as problem:
        names = ", ".join(builtin_names())
        reason = getattr(problem, "strerror", None) or str(problem)
        raise ConfigError([f"cannot read it: {reason}; built-in recipes: {names}"], str(source)) from problem


def _override(table: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key.strip():
        raise ConfigError([f"{override!r} is not KEY=VALUE, for example tuning.rounds=4"], "--set")
    *path, last = (part.strip() for part in key.split("."))
    for part in path:
        table = table.setdefault(part, {})
        if not isinstance(table, dict):
            raise ConfigError([f"{key}: {part!r} is a value, not a section"], "--set")
    try:
        table[last] = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        table[last] = text


_COUNTS = ("topology.edges", "topology.clusters_per_edge", "topology.devices_per_cluster")
_NUMBERED = re.compile(r"edge-(\d+)(?:\.field|\.cluster-(\d+)\.device-(\d+))?")


def _drop_beyond(table: dict[str, Any]) -> None:
    """Leave out what a recipe says of edges, clusters and devices that an override has just taken away."""
    topology, default = table.get("topology", {}), TopologyRecipe()
    counts = [topology.get(name.partition(".")[2], getattr(default, name.partition(".")[2])) for name in _COUNTS]
    sections = (topology.get("sites"), topology.get("devices"), table.get("compute", {}).get("nodes"))
    for section in filter(None, sections):
        for name in [name for name in section if (match := _NUMBERED.fullmatch(name)) and _is_beyond(match, counts)]:
            del section[name]


def _is_beyond(match: re.Match[str], counts: Sequence[Any]) -> bool:
    numbers = zip(match.groups(), counts, strict=True)
    return any(index is not None and isinstance(count, int) and int(index) >= count for index, count in numbers)


def _explain(problem: Any) -> str:
    place = ".".join(str(part) for part in problem["loc"] if not _is_branch(part))
    if problem["type"] in ("unexpected_keyword_argument", "extra_forbidden"):
        *path, key = problem["loc"]
        names = _keys_at(path)
        close = difflib.get_close_matches(str(key), names, n=1, cutoff=0.5)
        hint = f"did you mean {close[0]!r}?" if close else f"valid keys: {', '.join(names)}"
        return f"{place}: unknown key; {hint}"
    return f"{place}: {problem['msg'][0].lower()}{problem['msg'][1:]}, not {problem['input']!r}"


def _is_branch(part: Any) -> bool:
    """Pydantic names the branch of a union in the location; people do not want to read it."""
    return isinstance(part, str) and part.startswith(("literal[", "tuple["))


def _keys_at(path: Sequence[Any]) -> list[str]:
    """The valid keys of the section at `path`."""
    section: Any = Recipe
    for part in path:
        if dataclasses.is_dataclass(section):
            section = typing.get_type_hints(section).get(str(part))
        elif typing.get_origin(section) is not None:
            section = typing.get_args(section)[-1]
    return [f.name for f in dataclasses.fields(section)] if dataclasses.is_dataclass(section) else []


def _contradictions(recipe: Recipe) -> Iterator[str]:
    """What is wrong between values that are right by themselves."""
    model, tunables, tuning = recipe.model, recipe.tunables, recipe.tuning
    if model.image_size % model.patch_size:
        yield f"model.patch_size: {model.patch_size} does not divide model.image_size {model.image_size}"
    if model.hidden_size % model.num_heads:
        yield f"model.num_heads: {model.num_heads} does not divide model.hidden_size {model.hidden_size}"
    if tuning.microbatches > tuning.batch_size:
        yield f"tuning.microbatches: {tuning.microbatches} is more than tuning.batch_size {tuning.batch_size}"
    if not (tunables.prompts or tunables.lora_rank or tunables.head):
        yield "tunables: nothing to tune; set prompts, lora_rank or head"
    topology = recipe.topology
    if recipe.data.owners > topology.devices_per_cluster:
        devices = topology.devices_per_cluster
        yield f"data.owners: {recipe.data.owners} is more than topology.devices_per_cluster {devices}"
    node_ids = build_topology(topology).nodes
    site_ids = build_topology(topology).sites
    yield from _unknown("topology.devices", topology.devices, node_ids)
    yield from _unknown("topology.sites", topology.sites, site_ids)
    yield from _unknown("compute.nodes", recipe.compute.nodes, node_ids)


def _unknown(place: str, given: Mapping[str, Any], known: Mapping[str, Any]) -> Iterator[str]:
    for name in given.keys() - known.keys():
        close = difflib.get_close_matches(name, known, n=1)
        hint = f"did you mean {close[0]!r}?" if close else f"valid: {', '.join(list(known)[:6])}, ..."
        yield f"{place}.{name}: no such name in this topology; {hint}"
