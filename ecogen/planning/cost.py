"""What a segment of a vision transformer costs: parameters, bytes, memory and FLOPs, by formula.

A decoder's shape has formulas of its own for the same functions (`planning.decoder_cost`).

The blocks are those of transformers' `ViTLayer`: attention with four square projections, an MLP and two layer norms,
all with biases. FLOPs are those of the matrix products, two a multiply-add; norms, softmax and GELU are left out, as
torch's own counter does.

Legend: D hidden size, I intermediate size, T tokens with CLS, T' those of a block with its P prompts, Q those of them
that ask: all T', or CLS alone in the last block, since a head looks at nothing else. r LoRA rank, m bottleneck size,
L labels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import singledispatch
from typing import Literal

from ecogen.config import TunedBlock
from ecogen.placement import Segment


@dataclass(frozen=True, slots=True)
class ModelShape:
    """The sizes of a vision transformer and of what is tuned in it.

    Attributes:
        num_tokens: patches and CLS; prompts are not among them.
        patch_dim: channels x patch height x patch width.
        tuned: what trains in each block, one a block; none where all are frozen. LoRA's targets are square, D x D.
        prompts_stay: prompts that entered go on through all blocks above and cross the cuts (shallow ones).
        norm: what trains of the last norm.
        all_tokens: the last block computes all of them too, and sends them to a head on another node.
        bytes_per_parameter: of parameters, activations, gradients and optimizer states alike.
        tunable_states: numbers kept besides each tunable while it trains: its gradient, and AdamW's moments.
    """

    num_blocks: int
    hidden_size: int
    intermediate_size: int
    num_tokens: int
    patch_dim: int
    num_labels: int
    tuned: tuple[TunedBlock, ...] = ()
    prompts_stay: bool = False
    head_trains: bool = True
    norm: Literal["frozen", "biases", "all"] = "frozen"
    all_tokens: bool = False
    bytes_per_parameter: int = 4
    tunable_states: int = 3

    @property
    def lowest_tunable_block(self) -> int:
        """The first block that needs a gradient; `num_blocks` where only what is above the blocks trains."""
        return next((index for index, block in enumerate(self.tuned) if block.is_tuned), self.num_blocks)

    @property
    def embedding(self) -> Literal["frozen", "biases", "all"]:
        """What trains of the embedding: it goes with the first block."""
        return self.tuned[0].backbone if self.tuned else "frozen"

    def of_block(self, index: int) -> TunedBlock:
        """What trains in one block."""
        return self.tuned[index] if self.tuned else TunedBlock()

    def tokens_in_block(self, index: int) -> int:
        """T + P: what a block computes on."""
        entered = self.tuned[: index + 1] if self.prompts_stay else self.tuned[index : index + 1]
        return self.num_tokens + sum(block.prompts for block in entered)

    def queries_in_block(self, index: int) -> int:
        """Q: what a block gives an output for."""
        return 1 if index == self.num_blocks - 1 and not self.all_tokens else self.tokens_in_block(index)

    def tokens_on_cut(self, cut: int) -> int:
        """What crosses the cut below block `cut`: T and the prompts that entered and stay; to the head CLS only."""
        if cut == self.num_blocks and not self.all_tokens:
            return 1
        return self.num_tokens + self.prompts_stay * sum(block.prompts for block in self.tuned[:cut])

    def seeing(self, num_tokens: int) -> ModelShape:
        """The same for inputs of so many tokens; of images all have as many."""
        return self

    def with_rank_at_most(self, rank: int | None) -> ModelShape:
        """The same with no LoRA rank above this one; None changes nothing."""
        if rank is None:
            return self
        return replace(self, tuned=tuple(replace(block, lora_rank=min(block.lora_rank, rank)) for block in self.tuned))


@singledispatch
def num_parameters(shape: ModelShape, segment: Segment) -> int:
    """Parameters of a segment as transformers counts them: the backbone and the head, without what was added to tune.

    Embedding (patch_dim + 1) D + (1 + T) D, block 4 (D D + D) + 2 D I + I + D + 4 D, head 2 D + (D + 1) L.
    """
    head = 2 * shape.hidden_size + _classifier(shape)
    inner = segment.has_embedding * _embedding(shape) + len(segment) * _block(shape)
    return inner + segment.has_head * head


@singledispatch
def num_adapter_parameters(shape: ModelShape, segment: Segment) -> int:
    """Parameters that come on top of the model's own.

    In each block prompts P D, LoRA 2 D r a target and DoRA's magnitudes D a target, IA3 2 D + I, a bottleneck of size m
    2 D m + m + D.
    """
    return sum(_num_adapter_parameters(shape, shape.of_block(index)) for index in segment.blocks)


def _num_adapter_parameters(shape: ModelShape, block: TunedBlock) -> int:
    d, m = shape.hidden_size, block.bottleneck
    lora = len(block.lora_targets) * d * (2 * block.lora_rank + block.has_magnitudes)
    ia3 = block.ia3 * (2 * d + shape.intermediate_size)
    return block.prompts * d + lora + ia3 + (2 * d * m + m + d if m else 0)


@singledispatch
def num_tunables(shape: ModelShape, segment: Segment) -> int:
    """Parameters of a segment that train and travel: prompts, adapters, classifier and backbone, those that do."""
    head = segment.has_head and shape.head_trains
    return num_adapter_parameters(shape, segment) + head * _classifier(shape) + _num_backbone_tunables(shape, segment)


def _num_backbone_tunables(shape: ModelShape, segment: Segment) -> int:
    """All of a part, or its biases: D of the embedding, 7 D + I a block, D of the norm."""
    d = shape.hidden_size
    embedding = {"frozen": 0, "biases": d, "all": _embedding(shape)}
    block = {"frozen": 0, "biases": 7 * d + shape.intermediate_size, "all": _block(shape)}
    norm = {"frozen": 0, "biases": d, "all": 2 * d}
    blocks = sum(block[shape.of_block(index).backbone] for index in segment.blocks)
    return segment.has_embedding * embedding[shape.embedding] + blocks + segment.has_head * norm[shape.norm]


def _passed(shape: ModelShape, segment: Segment) -> range:
    return range(max(segment.start, shape.lowest_tunable_block), segment.stop)


def tunable_bytes(shape: ModelShape, segment: Segment) -> int:
    """Bytes of the tunables of a segment: what travels each round, one way."""
    return shape.bytes_per_parameter * num_tunables(shape, segment)


def activation_bytes(shape: ModelShape, cut: int) -> int:
    """Bytes of one example's activations on a cut: T D, and P D where shallow prompts are; D above the last block.

    There the head needs CLS only. Gradients are as large. Deep prompts never cross a cut.
    """
    return shape.bytes_per_parameter * shape.tokens_on_cut(cut) * shape.hidden_size


def memory_bytes(shape: ModelShape, segments: Sequence[Segment], examples_in_flight: int, *, tunes: bool = True) -> int:
    """Memory that a node needs to hold its segments and tune them.

    bytes_per_parameter x (parameters + prompts and adapters + states x tunables + examples in flight x kept
    activations): of states three, a gradient and AdamW's two moments a tunable (Kingma and Ba 2015), or as many as the
    method has, and `kept_activations` an example. Without tuning: parameters, prompts, adapters and one block's
    activations. The interpreter and its libraries are not counted.
    """
    parameters = sum(num_parameters(shape, s) + num_adapter_parameters(shape, s) for s in segments)
    states = shape.tunable_states * sum(num_tunables(shape, s) for s in segments) if tunes else 0
    kept = sum(kept_activations(shape, s) for s in segments) if tunes else 0
    largest = max((largest_activations(shape, segment) for segment in segments), default=0)
    activations = examples_in_flight * (kept + largest)
    return shape.bytes_per_parameter * (parameters + states + activations)


@singledispatch
def kept_activations(shape: ModelShape, segment: Segment) -> int:
    """Numbers that one example leaves in a segment for its backward pass.

    A block that gradients pass keeps 4 T' D, the first norm's input, the adapters' input, keys and values, and
    Q (4 D + I), queries, attention's output and its log-sum-exp (at most D), the second norm's input and what enters
    GELU. Frozen linear layers keep nothing, linear layers that train their inputs: Q (D + I) more, and the patches.
    What is added keeps, a token it works on: DoRA 2 D a target (what it scales), IA3 2 D + I (what its factors meet),
    a bottleneck D + m. Attention probabilities are recomputed by the fused kernel. The head keeps 2 D for its norm.
    """
    head = 2 * shape.hidden_size
    patches = segment.has_embedding * (shape.embedding == "all") * (shape.num_tokens - 1) * shape.patch_dim
    blocks = sum(_activations_of_block(shape, index) for index in _passed(shape, segment))
    return patches + blocks + segment.has_head * head


@singledispatch
def largest_activations(shape: ModelShape, segment: Segment) -> int:
    """Numbers that one example needs in the largest block of a segment while that is computed."""
    return max((_activations_of_block(shape, index) for index in segment.blocks), default=0)


@singledispatch
def forward_flops(shape: ModelShape, segment: Segment, num_examples: int = 1) -> int:
    """FLOPs of the forward pass of some examples at once through a segment.

    Embedding 2 (T - 1) patch_dim D, block 4 T' D D + 2 Q (2 D D + 2 D I) + 4 Q T' D (with Q = T' it is Kaplan et al.
    2020, 2N + 4 s d a token and layer, prompts among the tokens) + 4 r D a LoRA target and token, T' of keys and values
    and Q of others + 4 Q m D of a bottleneck, head 2 D L on CLS alone; all that an example. DoRA multiplies its factors
    out, 4 D D r a target, once for all examples.
    """
    blocks = sum(
        _linear_flops(shape, index) + _attention_flops(shape, index) + _adapter_flops(shape, index)
        for index in segment.blocks
    )
    each = segment.has_embedding * _embedding_flops(shape) + blocks + segment.has_head * _head_flops(shape)
    return num_examples * each + sum(_dora_flops(shape, shape.of_block(index)) for index in segment.blocks)


@singledispatch
def backward_flops(shape: ModelShape, segment: Segment, num_examples: int = 1) -> int:
    """FLOPs of the backward pass of some examples at once through a segment.

    A frozen linear layer computes only the gradient of its input: once its forward cost; one that trains, that of
    its weights too. Both factors of an attention product, of a LoRA product and of a bottleneck need one: twice. Below
    the lowest tunable block: zero, but for the weights of an embedding that trains. That block itself is counted whole,
    although without prompts its own input needs no gradient. DoRA's norms are constants (Liu et al. 2024, section 4.3).
    """
    blocks = sum(
        _linear_flops(shape, index) * (1 + (shape.of_block(index).backbone == "all"))
        + 2 * _attention_flops(shape, index)
        + 2 * _adapter_flops(shape, index)
        for index in _passed(shape, segment)
    )
    embedding = segment.has_embedding * (shape.embedding == "all") * _embedding_flops(shape)
    passes_below = shape.lowest_tunable_block < shape.num_blocks or shape.norm != "frozen"
    head = segment.has_head * _head_flops(shape) * (shape.head_trains + passes_below)
    return num_examples * (embedding + blocks + head)


def _embedding(shape: ModelShape) -> int:
    return (shape.patch_dim + 1) * shape.hidden_size + (1 + shape.num_tokens) * shape.hidden_size


def _block(shape: ModelShape) -> int:
    d = shape.hidden_size
    return 4 * (d * d + d) + 2 * d * shape.intermediate_size + shape.intermediate_size + d + 4 * d


def _classifier(shape: ModelShape) -> int:
    return (shape.hidden_size + 1) * shape.num_labels


def _activations_of_block(shape: ModelShape, index: int) -> int:
    d, i, block = shape.hidden_size, shape.intermediate_size, shape.of_block(index)
    tokens, queries = shape.tokens_in_block(index), shape.queries_in_block(index)
    trained = (d + i) * (block.backbone == "all")
    dora = 2 * d * _lora_tokens(shape, index) * block.has_magnitudes
    bottleneck = d + block.bottleneck if block.bottleneck else 0
    of_keys, of_queries = 4 * d + 2 * d * block.ia3, 4 * d + i + trained + i * block.ia3 + bottleneck
    return tokens * of_keys + queries * of_queries + dora


def _embedding_flops(shape: ModelShape) -> int:
    return 2 * (shape.num_tokens - 1) * shape.patch_dim * shape.hidden_size


def _linear_flops(shape: ModelShape, index: int) -> int:
    d, tokens, queries = shape.hidden_size, shape.tokens_in_block(index), shape.queries_in_block(index)
    return 2 * tokens * 2 * d * d + 2 * queries * (2 * d * d + 2 * d * shape.intermediate_size)


def _attention_flops(shape: ModelShape, index: int) -> int:
    return 4 * shape.queries_in_block(index) * shape.tokens_in_block(index) * shape.hidden_size


def _adapter_flops(shape: ModelShape, index: int) -> int:
    block = shape.of_block(index)
    inner = block.lora_rank * _lora_tokens(shape, index) + block.bottleneck * shape.queries_in_block(index)
    return 4 * shape.hidden_size * inner


def _lora_tokens(shape: ModelShape, index: int) -> int:
    """Tokens that LoRA works on in a block, of all its targets together."""
    targets = shape.of_block(index).lora_targets
    of_keys = sum(target in ("k_proj", "v_proj") for target in targets)
    return of_keys * shape.tokens_in_block(index) + (len(targets) - of_keys) * shape.queries_in_block(index)


def _dora_flops(shape: ModelShape, block: TunedBlock) -> int:
    return 4 * shape.hidden_size**2 * block.lora_rank * len(block.lora_targets) * block.has_magnitudes


def _head_flops(shape: ModelShape) -> int:
    return 2 * shape.hidden_size * shape.num_labels
