"""What a recipe may say: frozen values with their defaults and ranges.

Only the top verbs see a `Recipe`; components take plain arguments.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import field
from typing import Annotated, Literal

from pydantic import Field
from pydantic.dataclasses import dataclass

from ecogen.config.tunables import Tunables
from ecogen.config.types import (
    STRICT,
    Count,
    DeviceName,
    DtypeName,
    Factor,
    Natural,
    NonNegative,
    Positive,
    Rate,
    Seed,
    Share,
    Slowness,
    WireType,
)
from ecogen.placement import Labels

MADE_HERE = ("pretrain", "untrained")
"""The sources of `model.source` that need nothing but this program."""

NUM_LABELS = 10
"""Of each data set of images."""

BESIDE_FAULTY = {"trimmed_mean": 1, "multi_krum": 3}
"""How many updates a strategy needs beside two for each that may be faulty; for sources see `tuning.strategies`."""


@dataclass(frozen=True, config=STRICT)
class Model:
    """The foundation model, made and pre-trained in the cloud, or loaded from a folder or hub.

    For images a vision transformer, for text a decoder; one that is made here is a Llama.
    """

    source: str = "pretrain"  # "pretrain", "untrained", a folder written by save_pretrained, or "hf:<repository>"
    hidden_size: Annotated[int, Field(ge=4, multiple_of=4)] = 128  # sines and cosines of rows and columns
    num_blocks: Count = 4
    num_heads: Count = 4
    intermediate_size: Count = 256
    image_size: Count = 28
    patch_size: Count = 7
    num_channels: Count = 1
    vocabulary_size: Annotated[int, Field(ge=300)] = 2048  # of the tokenizer of a text model that is made here
    codebook_size: Annotated[int, Field(ge=2, le=65_536)] = 256  # pairs: kinds of patches that images are told in
    context_length: Annotated[int, Field(ge=8)] = 128  # text: tokens of a passage, the most that the model is shown


@dataclass(frozen=True, config=STRICT)
class Pretraining:
    """How the cloud pre-trains the foundation model: arguments of `tuning.pretrain.pretrain`, or `pretrain_decoder`."""

    seed: Seed = 0
    steps: Count = 700
    batch_size: Annotated[int, Field(ge=2, le=1302)] = 64  # no more than there are glyphs
    temperature: Positive = 0.1  # images
    matrix_rate: Positive = 0.02
    learning_rate: Positive = 2e-3
    weight_decay: NonNegative = 0.05
    # Rendered from fonts; the images of the data set that no device owns; for text, topics of Python's documentation.
    corpus: Literal["glyphs", "data", "documentation"] = "glyphs"
    image_steps: Count = 800  # pairs: of the image tokenizer, before the model's own


@dataclass(frozen=True, config=STRICT)
class Partition:
    """How training examples are divided: first over edges, then over the clusters of an edge."""

    # "domain", of text: each edge has documents of its own, which its validation and test passages are of too
    across_edges: Literal["iid", "dirichlet", "domain"] = "dirichlet"
    within_edge: Literal["iid", "dirichlet"] = "iid"
    alpha: Positive = 0.5  # concentration of the Dirichlet draw; small is uneven (Hsu et al. 2019)


@dataclass(frozen=True, config=STRICT)
class LaterSource:
    """What an edge's images with captions are from a round on, in place of those before: its domain changes."""

    round: Annotated[int, Field(ge=2)]  # the first with these, counted from 1
    name: str = ""  # as that of `PairSource`; empty: the same as before
    labels: tuple[Natural, ...] = ()


@dataclass(frozen=True, config=STRICT)
class PairSource:
    """Where an edge's images with captions are from."""

    name: str = "digits"  # or "mnist", or a folder with captions.jsonl
    labels: tuple[Natural, ...] = ()  # of digits, those that the edge has; all where none are named
    later: LaterSource | None = None

    @property
    def domains(self) -> tuple[PairSource, ...]:
        """What the edge has at first and, where that changes, then."""
        if self.later is None:
            return (self,)
        return (self, PairSource(self.later.name or self.name, self.later.labels))


@dataclass(frozen=True, config=STRICT)
class Data:
    """Which examples the devices own: labelled images, text, or images with captions.

    Of text, an example is a passage, and `train` (at most), `validation` and `test` are passages of each edge; of
    images with captions they are pairs of each edge.
    """

    name: Literal["digits", "mnist", "documentation", "text", "pairs"] = "digits"
    sources: Mapping[str, PairSource] = field(default_factory=dict)  # of pairs, by edge; all digits where not said
    # On every node's machine. mnist: an npz file; empty: mnist/mnist.npz or mnist.npz below $ECOGEN_DATA. text: a text,
    # JSONL or Parquet file, a folder of these, or "hf:<repository>"; `tuning.documents` says what they hold.
    path: str = ""
    labelled: Annotated[float, Field(gt=0, le=1)] = 1.0  # share of each device's training examples that have a label
    train: Count = 1200
    validation: Natural = 147
    test: Natural = 0  # 0: all there are; another number gives the same test examples whatever `train` is
    owners: Count = 1  # devices of each cluster that own data; they take turns as the start, an epoch each
    partition: Partition = field(default_factory=Partition)
    # By edge, the labels that it knows; others know all. Where edges differ, heads stay at the edges.
    labels_of_edges: Mapping[str, Annotated[tuple[Natural, ...], Field(min_length=2)]] = field(default_factory=dict)

    @property
    def is_text(self) -> bool:
        """Whether examples are passages for a language model, not images for a vision transformer."""
        return self.name in ("documentation", "text", "pairs")

    @property
    def is_pairs(self) -> bool:
        """Whether passages are images with captions."""
        return self.name == "pairs"


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
class PoolRow(DeviceProfile):
    """Devices of one kind at an edge, of which clusters are formed."""

    edge: str = "edge-0"
    count: Count = 1
    link: LinkProfile | None = None  # what connects each of them with all others; as `d2d` where there is none


@dataclass(frozen=True, config=STRICT)
class TopologyRecipe:
    """A cloud, edges, clusters and devices, by number, with profiles by tier and exceptions by node id.

    With a pool, its devices are `edge-0.device-0` and so on, and `planning.forming` makes the clusters of them before
    a run: then they stand in `clusters`, which a recipe may also say itself; `devices_per_cluster` says nothing.

    Power: Cloud Carbon Footprint's coefficients of an EPYC gen 4 vCPU, 0.74 W idle and 2.28 W busy, since the
    nodes of a run on one machine are its threads; give the watts of your own devices.
    Round-trip times: cloud 30-50 ms, edge below 10 ms (Table 1 of the overview paper), D2D as within a Wi-Fi cell.
    """

    edges: Count = 2
    clusters_per_edge: Count | Literal["auto"] = 3  # "auto": as many of the pool as tune the most examples a second
    devices_per_cluster: Count = 3
    pool: tuple[PoolRow, ...] = ()
    clusters: Mapping[str, tuple[str, ...]] = field(default_factory=dict)  # devices of the pool in order, by cluster id
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
    cuts_of: Mapping[str, tuple[Count, ...]] = field(default_factory=dict)  # by cluster id, where one has its own


@dataclass(frozen=True, config=STRICT)
class NodeCompute:
    """What one node computes on."""

    device: DeviceName = "cpu"
    dtype: DtypeName = "float32"
    threads: Count = 1  # of its process; nodes that share one have one each


@dataclass(frozen=True, config=STRICT)
class Compute:
    """What the nodes compute on; `nodes` overrides by node id."""

    device: DeviceName = "cpu"
    dtype: DtypeName = "float32"
    threads: Count = 1
    nodes: Mapping[str, NodeCompute] = field(default_factory=dict)


@dataclass(frozen=True, config=STRICT)
class Unlabelled:
    """What devices do with examples that have no label; the paper is Sohn et al. 2020, https://arxiv.org/abs/2001.07685."""

    method: Literal["ignore", "fixmatch"] = "ignore"
    teacher: Literal["self", "edge"] = "self"  # who predicts: the model at that step (the paper's), or the edge's
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
    optimizer: Literal["adamw", "sgd"] = "adamw"  # of local steps; SGD has no momentum, as in FedAvg and SCAFFOLD
    learning_rate: Positive = 8e-3
    learning_rate_decay: Annotated[float, Field(gt=0, le=1)] = 0.75  # factor a round
    weight_decay: NonNegative = 0.01
    epsilon: Positive = 1e-8  # AdamW's; a larger one makes steps small where gradients are
    proximal: NonNegative = 0.0  # mu of FedProx: pulls local steps back to where the round began
    participation: Rate = 1.0  # with this probability each cluster takes part in a round, drawn anew every round
    clip_norm: NonNegative = 1.0  # 0 turns clipping off
    augmentation: Share = 0.5  # strength of random shifts, rotations and scales on the device
    augmentation_views: Natural = 0  # how many images each example has, epoch by epoch in turn; 0: always a new one
    # Of activations from below the tunables that a device keeps so as not to be sent them again, and an edge and the
    # cloud, if all those of their evaluations fit, so as not to compute them again.
    prefix_memory_mib: NonNegative = 64.0
    prefix_disk_mib: NonNegative = 1024.0  # of those for which memory has no room
    unlabelled: Unlabelled = field(default_factory=Unlabelled)
    cloud_every: Natural = 1  # edge rounds between two averagings in the cloud (T_e); 0: edges stay alone
    round_timeout_s: Positive = 600.0
    rejoin_timeout_s: Positive = 120.0


@dataclass(frozen=True, config=STRICT)
class Relay:
    """How cloud and edges teach each other by what their generators draw; of images with captions."""

    every: Natural = 0  # rounds between two exchanges, of which each is a lesson up and one down; 0: none by schedule
    # An edge asks for one too when its held-out pairs differ from those of its last exchange, by a test of this level.
    drift: Annotated[float, Field(ge=0, lt=1)] = 0.0  # 0: it does not look
    samples: Count = 400  # pairs that a teacher hands on, at most
    # Of their codes. At 0.4, as users get them, pictures are alike: who learns from them holds real ones for unlikely.
    # At 1 they are more various, and harder to learn from in a few hundred steps.
    temperature: Annotated[float, Field(ge=0.01, le=100, allow_inf_nan=False)] = 0.7
    tunables: bool = False  # edges send theirs too: the cloud begins to learn where the way to their mean is best
    steps: Count = 240  # in which the cloud learns from them; an edge takes half of them, at half of the rate
    batch_size: Count = 24
    learning_rate: Positive = 8e-3  # of the first step, AdamW's; falls to 0 along half a cosine
    rehearsal: Annotated[float, Field(ge=0, lt=1)] = 0.5  # of each batch, what the receiver itself drew before
    # As much is learnt as lets perplexity on what the receiver knew rise by no more than this share.
    tolerance: NonNegative = 0.15

    @property
    def is_on(self) -> bool:
        """Whether there are lessons at all."""
        return bool(self.every or self.drift)


@dataclass(frozen=True, config=STRICT)
class Aggregation:
    """How an edge puts its clusters' updates together; the cloud averages those of the edges."""

    strategy: str = "fedavg"  # of `tuning.strategies`, or of a package that offers one
    faulty: Natural = 1  # trimmed_mean, multi_krum: clusters that may send anything
    # The server's learning rate (eta in Reddi et al. 2021); 0: the strategy's own, 0.01 with fedadam and fedyogi, or 1.
    server_rate: NonNegative = 0.0
    beta_1: Annotated[float, Field(ge=0, lt=1)] = 0.9
    beta_2: Annotated[float, Field(ge=0, lt=1)] = 0.99
    tau: Positive = 1e-3
    buffer: Natural = 0  # updates that an edge goes on with, whosoever they are (FedBuff); 0: clusters wait for all
    # What becomes of LoRA's two factors: each averaged by itself, or the mean of their products, or of the changes of
    # these, exact but for the cut to the edge's rank. auto: factors where clusters have one rank, else changes.
    lora: Literal["auto", "factors", "products", "changes"] = "auto"


@dataclass(frozen=True, config=STRICT)
class Privacy:
    """Differential privacy of clusters or of examples.

    Of clusters: DP-FedAvg, McMahan et al. 2018, https://arxiv.org/abs/1710.06963. Of examples: DP-SGD, Abadi et al.
    2016, https://arxiv.org/abs/1607.00133, with `tuning.batch_size` as the mean of Poisson draws.
    """

    # z: the noise's deviation by clip_norm; 0: nothing is clipped or noised
    noise_multiplier: Annotated[float, Field(ge=0, le=1e3)] = 0.0
    # The longest change of all its tunables that a cluster may make in a round (S), or gradient of an example (C)
    clip_norm: Positive = 1.0
    delta: Annotated[float, Field(gt=0, lt=1)] = 1e-5  # with which epsilon may fail; below 1 / how many there are
    unit: Literal["cluster", "example"] = "cluster"  # what is protected; an example is a passage, or a pair

    @property
    def protects_clusters(self) -> bool:
        return self.unit == "cluster" and self.noise_multiplier > 0

    @property
    def protects_examples(self) -> bool:
        return self.unit == "example" and self.noise_multiplier > 0


@dataclass(frozen=True, config=STRICT)
class Faults:
    """What goes wrong on purpose, to see what survives it."""

    update_factor: Mapping[str, Factor] = field(default_factory=dict)  # by cluster: times its change of the tunables
    slow: Mapping[str, Slowness] = field(default_factory=dict)  # by device: times as long its computations take


@dataclass(frozen=True, config=STRICT)
class Evaluation:
    """What is measured besides tuning."""

    split: Literal["test", "validation", "none"] = "test"
    requests: Natural = 20  # requests through the split chain of each edge once the model is tuned
    inversion: bool = False  # attack what crosses the first cut, and report how much it recovers
    drawings: Count = 200  # of pairs: images that each edge's tuned model draws, to be judged, one a caption at least
    crossings: Natural = 0  # of pairs: pictures that each edge has the cloud draw and describe, both ways


@dataclass(frozen=True, config=STRICT)
class Semantic:
    """Whether a question that means the same as an earlier one is given its answer; off unless `answers` is set."""

    answers: Natural = 0  # that an edge keeps, for questions in other words; 0: none
    false_hits: Annotated[float, Field(gt=0, le=0.5)] = 0.01  # of opposite questions, at most this share is mixed up
    age_s: Positive = 3600.0  # for so long an answer is given
    mib: Positive = 16.0  # of all answers together
    pairs: str = ""  # a file of pairs of questions to choose the threshold by; empty: EcoGen's own


@dataclass(frozen=True, config=STRICT)
class Serving:
    """How clusters serve a language model."""

    slots: Count = 8  # requests at once in each group; a chain has as many groups as stages
    max_tokens: Count = 2048  # the longest request, prompt and answer; no more than the model was made for
    chunk: Count = 256  # tokens of a prompt that go through at once, while others decode
    shelf: Natural = 4  # places of each group for what requests leave behind; the next that begin alike start there
    answers: Natural = 0  # whole answers that an edge keeps, for the same request again; 0: each is computed
    semantic: Semantic = field(default_factory=Semantic)
    waiting: Count = 256  # requests that may wait for a slot at an edge
    replicas: Natural = 0  # clusters of an edge that serve always, the others when these have no room; 0: all
    busy_s: Positive = 2.0  # for so long requests wait before another cluster serves
    idle_s: Positive = 60.0  # for so long the others have room before one ends
    patience_s: Positive = 30.0  # how long requests wait for devices that can hold the model
    books_s: Positive = 300.0  # for so long what an edge serves is one record; an hour where nobody asks anything


@dataclass(frozen=True, config=STRICT)
class TransportRecipe:
    """Limits between nodes."""

    # The largest message, both ways: a piece of a delivery (`runtime.delivery`) needs 4 MiB, and gRPC ends at 2 GiB.
    message_mib: Annotated[int, Field(ge=8, le=2047)] = 64


@dataclass(frozen=True, config=STRICT)
class Wire:
    """What tuning sends, and in which numeric types; int8 has a scale for each token, and for each vector of tunables.

    `tokens = "all"` and `gradients_to = "start"`, with no room for prefixes, are plain split learning, to compare with.
    """

    activations: WireType = "float32"
    gradients: WireType = "float32"
    orders: WireType = "float32"  # tunables, from an edge to its devices
    updates: WireType = "float32"  # how a device changed them; what rounding leaves is added to its next change
    tokens: Literal["needed", "all"] = "needed"  # the last block computes them and sends them to a head: CLS, or all
    gradients_to: Literal["tunables", "start"] = "tunables"  # the lowest tunable block, or down to the start device


@dataclass(frozen=True, config=STRICT)
class Recipe:
    """A complete run."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")] = "run"
    seed: Seed = 0
    engine: Literal["inproc", "local"] = "inproc"
    task: Literal["tune", "serve"] = "tune"  # what its nodes do
    model: Model = field(default_factory=Model)
    pretraining: Pretraining = field(default_factory=Pretraining)
    data: Data = field(default_factory=Data)
    topology: TopologyRecipe = field(default_factory=TopologyRecipe)
    placement: PlacementRecipe = field(default_factory=PlacementRecipe)
    compute: Compute = field(default_factory=Compute)
    tunables: Tunables = field(default_factory=Tunables)
    tuning: Tuning = field(default_factory=Tuning)
    relay: Relay = field(default_factory=Relay)
    aggregation: Aggregation = field(default_factory=Aggregation)
    privacy: Privacy = field(default_factory=Privacy)
    faults: Faults = field(default_factory=Faults)
    wire: Wire = field(default_factory=Wire)
    serving: Serving = field(default_factory=Serving)
    transport: TransportRecipe = field(default_factory=TransportRecipe)
    evaluation: Evaluation = field(default_factory=Evaluation)
