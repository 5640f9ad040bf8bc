"""What nodes report: usage of one piece of work, and records of rounds, requests, phases and events.

Records are plain values that travel as JSON lines; accounting and reports read them and never a running object.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

import msgspec

from ecogen.errors import RunError

Kind = Literal["backbone", "tunables", "activations", "gradients", "samples", "scores", "control"]
"""What a message carries. Samples are what generators drew. Labels, if sent at all, are counted as control."""
KINDS: tuple[Kind, ...] = ("backbone", "tunables", "activations", "gradients", "samples", "scores", "control")

LinkClass = Literal["cloud_edge", "edge_end", "d2d"]
LINK_CLASSES: tuple[LinkClass, ...] = ("cloud_edge", "edge_end", "d2d")

Phase = Literal["pretraining", "delivery", "tuning", "relay", "evaluation", "serving"]


class Traffic(msgspec.Struct, frozen=True):
    """What one node sent to another of one kind. Bytes are counted once, by the sender.

    Attributes:
        payload_bytes: raw tensor bytes.
        header_bytes: typed headers and length prefixes, as the codec wrote them.
        framing_bytes: what gRPC, HTTP/2 and TLS add, modelled from their specifications; 0 in memory.
    """

    receiver_id: str
    kind: Kind
    messages: int
    payload_bytes: int
    header_bytes: int
    framing_bytes: int = 0

    @property
    def total_bytes(self) -> int:
        return self.payload_bytes + self.header_bytes + self.framing_bytes


class Usage(msgspec.Struct, frozen=True):
    """Seconds, FLOPs and bytes of one node in one piece of work.

    Attributes:
        wall_s: length of the window.
        cpu_s: CPU time that the node itself spent: its process where it has one, its compute thread otherwise.
        flops: floating-point operations of the model, by formula (`planning.cost`), not counted by hardware.
        memory_bytes: the largest resident set of its process, or parameters and live activations in a shared process.
        method: how `cpu_s` came about.
    """

    node_id: str
    phase: Phase
    wall_s: float
    cpu_s: float
    flops: float = 0.0
    memory_bytes: int = 0
    traffic: tuple[Traffic, ...] = ()
    method: Literal["measured", "modelled", "reported"] = "measured"


class Score(msgspec.Struct, frozen=True):
    """How well a model does on held-out examples; None for what was not measured.

    Attributes:
        accuracy: the share of images with the right class, in [0, 1].
        perplexity: of text, e to the mean cross-entropy of a token, 1 or more.
    """

    accuracy: float | None = None
    perplexity: float | None = None


class RoundRecord(msgspec.Struct, frozen=True, tag="round", tag_field="type"):
    """One round of one aggregating node: an edge over its clusters, or the cloud over its edges.

    Attributes:
        accuracy: of the aggregate on the evaluation split, in [0, 1]; None where none was asked for.
        members: the clusters (of an edge) or edges (of the cloud) whose updates are in the aggregate.
        missing: those that took part but were lost before their update was complete.
        lora_error: by how much LoRA's products miss the mean of the members' products, as a share of that mean's norm;
            None where they are averaged factor by factor.
        num_examples: examples behind the aggregate, each counted once a round; 0 where that is private.
        epsilon: of an edge with differential privacy: spent so far. The loss is then private too, and not told; where
            clusters are protected, so are members and missing, and usages are spread evenly over the clusters.
        confident: share of unlabelled examples with a pseudo-label, over local steps and clusters; None without any.
        perplexity: as `accuracy`, of a language model; such has no accuracy.
    """

    node_id: str
    round_index: int
    accuracy: float | None
    loss: float | None
    num_examples: int
    members: tuple[str, ...]
    missing: tuple[str, ...]
    wall_s: float
    usages: tuple[Usage, ...]
    time_s: float = 0.0
    lora_error: float | None = None
    epsilon: float | None = None
    confident: float | None = None
    perplexity: float | None = None


class PhaseRecord(msgspec.Struct, frozen=True, tag="phase", tag_field="type"):
    """Work that is not a round: pre-training, delivery, an edge's evaluation of the language model it was delivered.

    Attributes:
        perplexity: what such an evaluation gave.
    """

    node_id: str
    phase: Phase
    wall_s: float
    usages: tuple[Usage, ...]
    detail: str = ""
    time_s: float = 0.0
    perplexity: float | None = None


class Taught(msgspec.Struct, frozen=True):
    """How well a receiver does before and after a lesson: perplexity on held-out pairs.

    Attributes:
        name: of the pairs.
        is_new: whether the lesson is about them; or else they are what was known before.
    """

    name: str
    before: float
    after: float
    is_new: bool


Cause = Literal["schedule", "drift"]
"""Why lessons are exchanged."""


class RelayRecord(msgspec.Struct, frozen=True, tag="relay", tag_field="type"):
    """One lesson of the knowledge relay: a receiver learnt from what teachers drew, or refused what came of it.

    Attributes:
        node_id: the receiver.
        direction: up, of the cloud from edges; down, of an edge from the cloud.
        cycle: the exchange it belongs to, in the order in which the cloud closed them.
        version: of the receiver's model after it; that before it where the lesson was refused.
        num_drawn: pictures that the teachers drew.
        num_samples: those that were handed on.
        num_disputed: of these, those that other teachers of their captions held for wrong, and nobody learnt from.
        sample_bytes: of all that were handed on, as tensors, and of those that went on to other teachers.
        usages: of the receiver since its last report, what it waited for lessons apart, as tuning; what a reply sends
            is in the next report.
        reason: of a refusal.
        cause: why the lessons were exchanged: their time had come, or an edge's domain had drifted.
        round_index: the round of the edges after which they were.
        p_value: of an edge's drift, by `relay.drift`.
        share: of the way from the weights before to what they were after learning, which is gone; 0 where refused.
        tunable_bytes: of the tunables that edges sent along, by `relay.tunables`.
        tunables_share: how far from the cloud's own tunables to the mean of these it began to learn, from 0 to 1.
    """

    node_id: str
    cycle: int
    direction: Literal["up", "down"]
    teachers: tuple[str, ...]
    accepted: bool
    version: int
    num_drawn: int
    num_samples: int
    sample_bytes: int
    scores: tuple[Taught, ...]
    wall_s: float
    usages: tuple[Usage, ...]
    reason: str = ""
    time_s: float = 0.0
    cause: Cause = "schedule"
    round_index: int | None = None
    p_value: float | None = None
    num_disputed: int = 0
    share: float = 1.0
    tunable_bytes: int = 0
    tunables_share: float = 0.0


class Hop(msgspec.Struct, frozen=True):
    """What one visit of a request computed and then sent on."""

    node_id: str
    segment: str
    compute_s: float
    receiver_id: str | None
    sent_bytes: int
    link_s: float


class RequestRecord(msgspec.Struct, frozen=True, tag="request", tag_field="type"):
    """One request served by a chain. latency_s = t_ul_s + t_inference_s + t_dl_s.

    The start device asks: t_ul_s is the first hop away from it, t_dl_s the last hop back to it (both
    modelled from the link: RTT/2 + bytes/bandwidth), t_inference_s the measured compute and the modelled hops between.
    """

    request_id: str
    cluster_id: str
    num_inputs: int
    t_ul_s: float
    t_inference_s: float
    t_dl_s: float
    hops: tuple[Hop, ...]
    usages: tuple[Usage, ...] = ()
    time_s: float = 0.0

    @property
    def latency_s(self) -> float:
        return self.t_ul_s + self.t_inference_s + self.t_dl_s


PictureTask = Literal["draw", "describe"]
Crossing = Literal["tokens", "pictures"]


class CrossingRecord(msgspec.Struct, frozen=True, tag="crossing", tag_field="type", kw_only=True):
    """One picture or caption of a text-image generator at another node: what crossed the link, and how long it took.

    Attributes:
        node_id: who asked.
        crossing: tokens, where pictures become tokens at the one who asks; or pictures (and text), where they do at the
            generator.
        sent_bytes, received_bytes: of the order and of the answer, whole messages as the codec wrote them.
        framing_bytes: what gRPC, HTTP/2 and TLS add to both, modelled; also where the run had no wire.
        encode_s, generate_s, decode_s: measured, each without waiting for a turn: to tokens, from tokens to tokens, and
            from tokens.
        transfer_s: measured on the network of the run: there and back, with the codec, without the generator's node.
        link_s: modelled from the recipe's link: RTT and (bytes + framing) / bandwidth, both ways.
        answer: a digest of the picture or caption.
        modules_bytes: of the modules' files, which are fetched once.
        usages: none; the closing books have them.
    """

    request_id: str
    node_id: str
    generator_id: str
    task: PictureTask
    crossing: Crossing
    sent_bytes: int
    received_bytes: int
    framing_bytes: int
    encode_s: float
    generate_s: float
    decode_s: float
    transfer_s: float
    link_s: float
    answer: str
    modules_bytes: int
    usages: tuple[Usage, ...] = ()
    time_s: float = 0.0


class ServedCounts(msgspec.Struct, frozen=True):
    """Requests that have ended, answered or broken off, and what they were.

    Attributes:
        num_requests: answers asked for, so that one with `n` counts as many; one that went on at another
            edge is counted where it began, and its prompt with it.
        prompt_tokens, completion_tokens: of these requests.
        reused_tokens: of the prompts' tokens, those that had been computed for another request.
        inference_s: of all of them together, each from its arrival at the edge to its last token.
        share_j: energy of what was computed and sent for them, modelled; no idle time, no memory.
    """

    num_requests: int
    prompt_tokens: int
    reused_tokens: int
    completion_tokens: int
    inference_s: float
    share_j: float

    @classmethod
    def zero(cls) -> ServedCounts:
        """Of no request."""
        return ServedCounts(0, 0, 0, 0, 0.0, 0.0)

    def __add__(self, other: ServedCounts) -> ServedCounts:
        """The counts of both together; of records, what else they hold is left out."""
        return ServedCounts(
            self.num_requests + other.num_requests,
            self.prompt_tokens + other.prompt_tokens,
            self.reused_tokens + other.reused_tokens,
            self.completion_tokens + other.completion_tokens,
            self.inference_s + other.inference_s,
            self.share_j + other.share_j,
        )


# What has such counts inherits them, since in JSON they stand beside its own fields.
class ServedRecord(ServedCounts, frozen=True, tag="served", tag_field="type", kw_only=True):
    """What an edge that serves has served in a while, and what the while took it and its devices.

    Attributes:
        share_j: a part of the usages' energy; the rest is idle time, memory, and what requests took that go on.
        usages: windows are contiguous, so that no time is in two records or in none; a node has several where it did
            something else meanwhile, such as loading the model anew.
    """

    node_id: str
    wall_s: float
    usages: tuple[Usage, ...]
    time_s: float = 0.0


EventKind = Literal[
    "joined", "lost", "rejoined", "cluster_failed", "cluster_formed", "resumed", "fenced", "rolled_back", "finished"
]


class EventRecord(msgspec.Struct, frozen=True, tag="event", tag_field="type"):
    """Something that happened to a node or a cluster."""

    event: EventKind
    node_id: str
    round_index: int | None = None
    detail: str = ""
    time_s: float = 0.0


Record = RoundRecord | PhaseRecord | RelayRecord | RequestRecord | CrossingRecord | ServedRecord | EventRecord

_ENCODER = msgspec.json.Encoder()
_DECODER: msgspec.json.Decoder[Record] = msgspec.json.Decoder(Record)


def to_line(record: Record) -> bytes:
    """The record as one JSON line, with its newline."""
    return _ENCODER.encode(record) + b"\n"


def from_line(line: bytes | str) -> Record:
    """The record that `to_line` wrote."""
    return _DECODER.decode(line)


def read_records(lines: Iterable[bytes], source: str) -> list[Record]:
    """All records of a JSON-lines file.

    A last line without its newline was cut off by a crash and is left out; any other bad line is an error.
    """
    records: list[Record] = []
    for number, line in enumerate(lines, start=1):
        try:
            records.append(from_line(line))
        except msgspec.MsgspecError as problem:
            if not line.endswith(b"\n"):
                break
            raise RunError(f"{source}:{number}: not a record ({problem}); restore the file or run again") from problem
    return records
