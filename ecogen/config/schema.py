"""What a recipe may say: frozen values with their defaults and ranges.

Only the top verbs see a `Recipe`; components take plain arguments.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import field
from typing import Annotated, Literal

from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass

from ecogen.placement import Labels

STRICT = ConfigDict(extra="forbid")

Count = Annotated[int, Field(ge=1)]
Natural = Annotated[int, Field(ge=0)]
Seed = Annotated[int, Field(ge=0, lt=2**63)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Finite = Annotated[float, Field(allow_inf_nan=False)]
NonNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Share = Annotated[float, Field(ge=0, le=1)]
DeviceName = Annotated[str, Field(pattern=r"^(auto|cpu|mps|cuda(:\d+)?)$")]
DtypeName = Literal["float32", "bfloat16"]
WireType = Literal["float32", "bfloat16", "int8"]
LoraTarget = Literal["q_proj", "k_proj", "v_proj", "o_proj"]


@dataclass(frozen=True, config=STRICT)
class Model:
    """The foundation model: a vision transformer, made and pre-trained in the cloud, or loaded from a folder or hub."""

    source: str = "pretrain"  # "pretrain", "untrained", a folder written by save_pretrained, or "hf:<repository>"
    hidden_size: Annotated[int, Field(ge=4, multiple_of=4)] = 128  # sines and cosines of rows and columns
    num_blocks: Count = 4
    num_heads: Count = 4
    intermediate_size: Count = 256
    image_size: Count = 28
    patch_size: Count = 7
    num_channels: Count = 1


@dataclass(frozen=True, config=STRICT)
class Pretraining:
    """How the cloud pre-trains the foundation model on unlabelled glyphs: arguments of `tuning.pretrain.pretrain`."""

    seed: Seed = 0
    steps: Count = 700
    batch_size: Annotated[int, Field(ge=2, le=1302)] = 64  # no more than there are glyphs
    temperature: Positive = 0.1
    matrix_rate: Positive = 0.02
    learning_rate: Positive = 2e-3
    weight_decay: NonNegative = 0.05


@dataclass(frozen=True, config=STRICT)
class Partition:
    """How training examples are divided: first over edges, then over the clusters of an edge."""

    across_edges: Literal["iid", "dirichlet"] = "dirichlet"
    within_edge: Literal["iid", "dirichlet"] = "iid"
    alpha: Positive = 0.5  # concentration of the Dirichlet draw; small is uneven (Hsu et al. 2019)


@dataclass(frozen=True, config=STRICT)
class Data:
    """Which labelled examples the devices own."""

    name: Literal["digits"] = "digits"
    labelled: Annotated[float, Field(gt=0, le=1)] = 1.0  # share of each device's training examples that have a label
    train: Count = 1200
    validation: Natural = 147
    test: Natural = 0  # 0: all that is left; another number gives the same test examples whatever `train` is
    owners: Count = 1  # devices of each cluster that own data; they take turns as the start, an epoch each
    partition: Partition = field(default_factory=Partition)


@dataclass(frozen=True, config=STRICT)
class SiteProfile:
    """Where nodes stand. Zones are those of `accounting.intensity`."""

    zone: str = "WORLD"
    pue: Annotated[float, Field(ge=1, allow_inf_nan=False)] = 1.0


@dataclass(frozen=True, config=STRICT)
class DeviceProfile:
    """Hardware of the nodes of a tier, or of one node."""

    memory_gib: Positive = 4.0
    gflops: Positive = 50.0
    idle_w: NonNegative = 0.74
    busy_w: Positive = 2.28


@dataclass(frozen=True, config=STRICT)
class LinkProfile:
    """A class of links."""

    rtt_ms: NonNegative
    mbit_per_s: Positive


@dataclass(frozen=True, config=STRICT)
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


@dataclass(frozen=True, config=STRICT)
class PlacementRecipe:
    """Where the model is cut, and where the labels are."""

    labels: Labels = "start"
    cuts: Literal["auto"] | tuple[Count, ...] = "auto"


@dataclass(frozen=True, config=STRICT)
class NodeCompute:
    """What one node computes on."""

    device: DeviceName = "cpu"
    dtype: DtypeName = "float32"


@dataclass(frozen=True, config=STRICT)
class Compute:
    """What the nodes compute on; `nodes` overrides by node id."""

    device: DeviceName = "cpu"
    dtype: DtypeName = "float32"
    nodes: Mapping[str, NodeCompute] = field(default_factory=dict)


@dataclass(frozen=True, config=STRICT)
class Tunables:
    """What trains and travels."""

    prompts: Natural = 4  # deep visual prompts a block (VPT-deep, Jia et al. 2022)
    lora_rank: Natural = 4
    lora_alpha: Positive = 8.0
    lora_targets: tuple[LoraTarget, ...] = ("q_proj", "v_proj")  # attention projections of each block
    head: bool = True
    backbone: Literal["frozen", "biases", "all"] = "frozen"  # what of the foundation model trains too
    first_block: Natural = 0  # all of it from this block upwards; no gradient flows below the lowest tunable


@dataclass(frozen=True, config=STRICT)
class Unlabelled:
    """What devices do with examples that have no label; the paper is Sohn et al. 2020, https://arxiv.org/abs/2001.07685."""

    method: Literal["ignore", "fixmatch"] = "ignore"
    threshold: Share = 0.95  # tau: a prediction at least so sure is a pseudo-label (the paper's)
    weight: NonNegative = 1.0  # lambda_u, of the unlabelled part of the loss (the paper's)
    ratio: Count = 7  # mu: unlabelled examples in a batch for each labelled one (the paper's)
    strength: Share = 1.0  # of the strong augmentation; the weak one is `tuning.augmentation`


@dataclass(frozen=True, config=STRICT)
class Tuning:
    """Hybrid federated split learning."""

    rounds: Count = 8
    local_epochs: Natural = 2
    batch_size: Count = 25
    microbatches: Count = 2
    learning_rate: Positive = 8e-3
    learning_rate_decay: Annotated[float, Field(gt=0, le=1)] = 0.75  # factor a round
    weight_decay: NonNegative = 0.01
    epsilon: Positive = 1e-8  # AdamW's; a larger one makes steps small where gradients are
    proximal: NonNegative = 0.0  # mu of FedProx: pulls local steps back to where the round began
    clip_norm: NonNegative = 1.0  # 0 turns clipping off
    augmentation: Share = 0.5  # strength of random shifts, rotations and scales on the device
    augmentation_views: Natural = 0  # how many images each example has, epoch by epoch in turn; 0: always a new one
    prefix_memory_mib: NonNegative = 64.0  # of activations from below the tunables, kept so as not to be sent again
    prefix_disk_mib: NonNegative = 1024.0  # of those for which memory has no room
    unlabelled: Unlabelled = field(default_factory=Unlabelled)
    cloud_every: Natural = 1  # edge rounds between two averagings in the cloud (T_e); 0: edges stay alone
    round_timeout_s: Positive = 600.0
    rejoin_timeout_s: Positive = 120.0


@dataclass(frozen=True, config=STRICT)
class Aggregation:
    """How an edge puts its clusters' updates together; the cloud averages those of the edges."""

    strategy: str = "fedavg"  # of `tuning.strategies`, or of a package that offers one
    faulty: Natural = 1  # trimmed_mean, multi_krum: clusters that may send anything
    server_rate: Positive = 0.1  # fedadam, fedyogi: the server's learning rate (eta in Reddi et al. 2021)
    beta_1: Annotated[float, Field(ge=0, lt=1)] = 0.9
    beta_2: Annotated[float, Field(ge=0, lt=1)] = 0.99
    tau: Positive = 1e-3


@dataclass(frozen=True, config=STRICT)
class Faults:
    """What goes wrong on purpose, to see what survives it."""

    update_factor: Mapping[str, Finite] = field(default_factory=dict)  # by cluster: times its change of the tunables


@dataclass(frozen=True, config=STRICT)
class Evaluation:
    """What is measured besides tuning."""

    split: Literal["test", "validation", "none"] = "test"
    requests: Natural = 20  # requests through the split chain of each edge once the model is tuned
    inversion: bool = False  # attack what crosses the first cut, and report how much it recovers


@dataclass(frozen=True, config=STRICT)
class TransportRecipe:
    """Limits between nodes."""

    # The largest message, both ways: a piece of a delivery (`runtime.delivery`) needs 4 MiB, and gRPC ends at 2 GiB.
    message_mib: Annotated[int, Field(ge=8, le=2047)] = 64


@dataclass(frozen=True, config=STRICT)
class Wire:
    """What tuning sends between devices, and in which numeric types; int8 has a scale for each token.

    `tokens = "all"` and `gradients_to = "start"`, with no room for prefixes, are plain split learning, to compare with.
    """

    activations: WireType = "float32"
    gradients: WireType = "float32"
    tokens: Literal["needed", "all"] = "needed"  # to a head on its own: CLS, or all
    gradients_to: Literal["tunables", "start"] = "tunables"  # the lowest tunable block, or down to the start device


@dataclass(frozen=True, config=STRICT)
class Recipe:
    """A complete run."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")] = "run"
    seed: Seed = 0
    engine: Literal["inproc", "local"] = "inproc"
    model: Model = field(default_factory=Model)
    pretraining: Pretraining = field(default_factory=Pretraining)
    data: Data = field(default_factory=Data)
    topology: TopologyRecipe = field(default_factory=TopologyRecipe)
    placement: PlacementRecipe = field(default_factory=PlacementRecipe)
    compute: Compute = field(default_factory=Compute)
    tunables: Tunables = field(default_factory=Tunables)
    tuning: Tuning = field(default_factory=Tuning)
    aggregation: Aggregation = field(default_factory=Aggregation)
    faults: Faults = field(default_factory=Faults)
    wire: Wire = field(default_factory=Wire)
    transport: TransportRecipe = field(default_factory=TransportRecipe)
    evaluation: Evaluation = field(default_factory=Evaluation)
