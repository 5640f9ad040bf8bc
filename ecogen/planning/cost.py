"""What a segment of a vision transformer costs: parameters, bytes, memory and FLOPs, by formula.

The blocks are those of transformers' `ViTLayer`: attention with four square projections, an MLP and two layer norms,
all with biases. FLOPs are those of the matrix products, two a multiply-add; norms, softmax and GELU are left out, as
torch's own counter does.

Legend: D hidden size, I intermediate size, T tokens with CLS, P prompts a block, r LoRA rank, L labels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from ecogen.placement import Segment


@dataclass(frozen=True, slots=True)
class ModelShape:
    """The sizes of a vision transformer and of what is tuned in it.

    Attributes:
        num_tokens: patches and CLS; prompts are not among them, since they live inside their block only.
        patch_dim: channels x patch height x patch width.
        num_lora_targets: attention projections a block with LoRA; each is square, D x D.
        first_tunable_block: prompts, LoRA and what trains of the backbone are in this block and above.
        backbone: what of the backbone trains.
        bytes_per_parameter: of parameters, activations, gradients and optimizer states alike.
    """

    num_blocks: int
    hidden_size: int
    intermediate_size: int
    num_tokens: int
    patch_dim: int
    num_labels: int
    prompts_per_block: int = 0
    lora_rank: int = 0
    num_lora_targets: int = 0
    first_tunable_block: int = 0
    head_trains: bool = True
    backbone: Literal["frozen", "biases", "all"] = "frozen"
    bytes_per_parameter: int = 4

    @property
    def lowest_tunable_block(self) -> int:
        """The first block that needs a gradient; `num_blocks` where only what is above the blocks trains."""
        has_adapters = self.prompts_per_block or self.lora_rank * self.num_lora_targets
        is_tuned = has_adapters or self.backbone != "frozen"
        return min(self.first_tunable_block, self.num_blocks) if is_tuned else self.num_blocks

    @property
    def tokens_in_block(self) -> int:
        """T + P: what a tuned block computes on."""
        return self.num_tokens + self.prompts_per_block


def num_parameters(shape: ModelShape, segment: Segment) -> int:
    """Parameters of a segment as transformers counts them: the backbone and the head, without prompts and LoRA.

    Embedding (patch_dim + 1) D + (1 + T) D, block 4 (D D + D) + 2 D I + I + D + 4 D, head 2 D + (D + 1) L.
    """
    head = 2 * shape.hidden_size + _classifier(shape)
    inner = segment.has_embedding * _embedding(shape) + len(segment) * _block(shape)
    return inner + segment.has_head * head


def num_adapter_parameters(shape: ModelShape, segment: Segment) -> int:
    """Parameters of prompts (P D a tuned block) and LoRA (2 D r a target), which come on top of the model's own."""
    d = shape.hidden_size
    per_block = shape.prompts_per_block * d + shape.num_lora_targets * shape.lora_rank * 2 * d
    return num_tuned_blocks(shape, segment) * per_block


def num_tunables(shape: ModelShape, segment: Segment) -> int:
    """Parameters of a segment that train and travel: prompts, LoRA, classifier and backbone, those that do."""
    head = segment.has_head and shape.head_trains
    return num_adapter_parameters(shape, segment) + head * _classifier(shape) + _num_backbone_tunables(shape, segment)


def _num_backbone_tunables(shape: ModelShape, segment: Segment) -> int:
    """All of it from the first tunable block on, or the biases: D of the embedding, 7 D + I a block, D of the norm."""
    if shape.backbone == "frozen":
        return 0
    d, takes_all = shape.hidden_size, shape.backbone == "all"
    embedding = segment.has_embedding * (shape.first_tunable_block == 0) * (_embedding(shape) if takes_all else d)
    block = _block(shape) if takes_all else 7 * d + shape.intermediate_size
    norm = segment.has_head * (2 * d if takes_all else d)
    return embedding + num_tuned_blocks(shape, segment) * block + norm


def num_tuned_blocks(shape: ModelShape, segment: Segment) -> int:
    """Blocks of a segment that hold something that trains, and that gradients therefore pass."""
    return max(0, segment.stop - max(segment.start, shape.lowest_tunable_block))


def parameter_bytes(shape: ModelShape, segment: Segment) -> int:
    """Bytes of the model's own parameters in a segment: what delivery sends once."""
    return shape.bytes_per_parameter * num_parameters(shape, segment)


def tunable_bytes(shape: ModelShape, segment: Segment) -> int:
    """Bytes of the tunables of a segment: what travels each round, one way."""
    return shape.bytes_per_parameter * num_tunables(shape, segment)


def activation_bytes(shape: ModelShape, cut: int) -> int:
    """Bytes of one example's activations on a cut: T D, or D above the last block, where the head needs CLS only.

    Its gradients are as large. Prompts never cross a cut.
    """
    tokens = shape.num_tokens if cut < shape.num_blocks else 1
    return shape.bytes_per_parameter * tokens * shape.hidden_size


def memory_bytes(shape: ModelShape, segments: Sequence[Segment], examples_in_flight: int, *, tunes: bool = True) -> int:
    """Memory that a node needs to hold its segments and tune them.

    bytes_per_parameter x (parameters + prompts and LoRA + 3 x tunables + examples in flight x kept activations): a
    gradient and AdamW's two moments a tunable (Kingma and Ba 2015), and `kept_activations` an example. Without
    tuning: parameters, prompts, LoRA and one block's activations. The interpreter and its libraries are not counted.
    """
    parameters = sum(num_parameters(shape, s) + num_adapter_parameters(shape, s) for s in segments)
    states = 3 * sum(num_tunables(shape, s) for s in segments) if tunes else 0
    kept = sum(kept_activations(shape, s) for s in segments) if tunes else 0
    activations = examples_in_flight * (kept + _activations_of_block(shape))
    return shape.bytes_per_parameter * (parameters + states + activations)


def kept_activations(shape: ModelShape, segment: Segment) -> int:
    """Numbers that one example leaves in a segment for its backward pass.

    A tuned block keeps (T + P)(8 D + I): both norms' inputs, the adapters' input, queries, keys, values, attention's
    output and its log-sum-exp (at most D), and what enters GELU. Frozen linear layers keep nothing, linear layers
    that train their inputs: D + I more, and the patches. Attention probabilities are recomputed by the fused kernel.
    The head keeps 2 D for its norm of CLS.
    """
    head = 2 * shape.hidden_size
    trains_below = shape.backbone == "all" and shape.first_tunable_block == 0
    patches = segment.has_embedding * trains_below * (shape.num_tokens - 1) * shape.patch_dim
    return patches + num_tuned_blocks(shape, segment) * _activations_of_block(shape) + segment.has_head * head


def forward_flops(shape: ModelShape, segment: Segment) -> int:
    """FLOPs of one example's forward pass through a segment.

    Embedding 2 (T - 1) patch_dim D, block 2 T' (4 D D + 2 D I) + 4 T' T' D (Kaplan et al. 2020, 2N + 4 s d a token and
    layer, with T' = T + P in a tuned block) + 4 T' r D a LoRA target, head 2 D L on CLS alone.
    """
    tuned = num_tuned_blocks(shape, segment)
    frozen = _linear_flops(shape, shape.num_tokens) + _attention_flops(shape, shape.num_tokens)
    within = _linear_flops(shape, shape.tokens_in_block) + _attention_flops(shape, shape.tokens_in_block)
    blocks = (len(segment) - tuned) * frozen + tuned * (within + _lora_flops(shape))
    return segment.has_embedding * _embedding_flops(shape) + blocks + segment.has_head * _head_flops(shape)


def backward_flops(shape: ModelShape, segment: Segment) -> int:
    """FLOPs of one example's backward pass through a segment.

    A frozen linear layer computes only the gradient of its input: once its forward cost; one that trains, that of
    its weights too. Both factors of an attention product and of a LoRA product need one: twice. Below the lowest
    tunable block: zero, but for the weights of an embedding that trains. That block itself is counted whole, although
    without prompts its own input needs no gradient.
    """
    tokens, takes_all = shape.tokens_in_block, shape.backbone == "all"
    linear = _linear_flops(shape, tokens) * (1 + takes_all)
    block = linear + 2 * _attention_flops(shape, tokens) + 2 * _lora_flops(shape)
    embedding = segment.has_embedding * takes_all * (shape.first_tunable_block == 0) * _embedding_flops(shape)
    passes_below = shape.lowest_tunable_block < shape.num_blocks
    head = segment.has_head * _head_flops(shape) * (shape.head_trains + passes_below)
    return embedding + num_tuned_blocks(shape, segment) * block + head


def _embedding(shape: ModelShape) -> int:
    return (shape.patch_dim + 1) * shape.hidden_size + (1 + shape.num_tokens) * shape.hidden_size


def _block(shape: ModelShape) -> int:
    d = shape.hidden_size
    return 4 * (d * d + d) + 2 * d * shape.intermediate_size + shape.intermediate_size + d + 4 * d


def _classifier(shape: ModelShape) -> int:
    return (shape.hidden_size + 1) * shape.num_labels


def _activations_of_block(shape: ModelShape) -> int:
    trained = (shape.hidden_size + shape.intermediate_size) * (shape.backbone == "all")
    return shape.tokens_in_block * (8 * shape.hidden_size + shape.intermediate_size + trained)


def _embedding_flops(shape: ModelShape) -> int:
    return 2 * (shape.num_tokens - 1) * shape.patch_dim * shape.hidden_size


def _linear_flops(shape: ModelShape, tokens: int) -> int:
    d = shape.hidden_size
    return 2 * tokens * (4 * d * d + 2 * d * shape.intermediate_size)


def _attention_flops(shape: ModelShape, tokens: int) -> int:
    return 4 * tokens * tokens * shape.hidden_size


def _lora_flops(shape: ModelShape) -> int:
    return 4 * shape.tokens_in_block * shape.lora_rank * shape.hidden_size * shape.num_lora_targets


def _head_flops(shape: ModelShape) -> int:
    return 2 * shape.hidden_size * shape.num_labels
