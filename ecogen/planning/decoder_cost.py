"""What a segment of a decoder of text costs: the functions of `planning.cost`, for its shape.

The blocks are Llama's: attention with grouped keys and values, a gated MLP, two root-mean-square norms, no biases; with
experts, the MLP as often as there are. FLOPs are those of the matrix products, as there; attention is counted in full,
though a token looks only back, as torch's own counter does. Of families that differ it is an estimate.

Legend: D hidden size, I intermediate size, V vocabulary, T tokens, Q queries' width of all heads, K keys', E experts
of which A work on a token, r LoRA rank.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from ecogen.placement import Segment
from ecogen.planning import cost
from ecogen.planning.cost import ModelShape


@dataclass(frozen=True, slots=True)
class DecoderShape(ModelShape):
    """The sizes of a decoder and of what is tuned in it; `num_labels` is V, and of patches there are none.

    Attributes:
        query_size, key_size: Q and K, heads times their width.
        ties: the head multiplies by the embedding, which so is there once.
        num_experts, active_experts: E and A.
    """

    query_size: int = 0
    key_size: int = 0
    ties: bool = False
    num_experts: int = 1
    active_experts: int = 1

    def seeing(self, num_tokens: int) -> DecoderShape:
        return replace(self, num_tokens=num_tokens)

    def tokens_in_block(self, index: int) -> int:
        return self.num_tokens

    def queries_in_block(self, index: int) -> int:
        return self.num_tokens

    def tokens_on_cut(self, cut: int) -> int:
        return self.num_tokens

    @property
    def linears(self) -> dict[str, tuple[int, int]]:
        """Inputs and outputs of each linear layer that LoRA may be added to."""
        d, i, q, k = self.hidden_size, self.intermediate_size, self.query_size, self.key_size
        return {**_attention(d, q, k), "gate_proj": (d, i), "up_proj": (d, i), "down_proj": (i, d)}

    def targets(self, index: int) -> Iterator[tuple[int, int]]:
        """Inputs and outputs of the layers that have LoRA in a block; of a name not known here, D and D."""
        linears, d = self.linears, self.hidden_size
        attention = _attention(d, self.query_size, self.key_size)
        parts = {"attention": attention, "mlp": {name: size for name, size in linears.items() if name not in attention}}
        for target in self.of_block(index).lora_targets:
            yield from parts[target].values() if target in parts else [linears.get(target, (d, d))]


def _attention(d: int, q: int, k: int) -> dict[str, tuple[int, int]]:
    return {"q_proj": (d, q), "k_proj": (d, k), "v_proj": (d, k), "o_proj": (q, d)}


@cost.num_parameters.register
def _num_parameters(shape: DecoderShape, segment: Segment) -> int:
    """Embedding V D, block 2 D (Q + K) + 3 E D I + 2 D, head D + V D, which a tied one beside its embedding has not."""
    d, vocabulary = shape.hidden_size, shape.num_labels * shape.hidden_size
    has_own = segment.has_head and not (shape.ties and segment.has_embedding)
    block = _attention_weights(shape) + shape.num_experts * _mlp_weights(shape) + 2 * d
    ends = segment.has_embedding * vocabulary + segment.has_head * d + has_own * vocabulary
    return ends + len(segment) * block


@cost.num_adapter_parameters.register
def _num_adapter_parameters(shape: DecoderShape, segment: Segment) -> int:
    """LoRA's (inputs + outputs) r a target, DoRA's magnitudes, one an output; IA3's 2 K + I."""
    return sum(_adapters_of_block(shape, index) for index in segment.blocks)


def _adapters_of_block(shape: DecoderShape, index: int) -> int:
    block = shape.of_block(index)
    lora = sum((i + o) * block.lora_rank + o * block.has_magnitudes for i, o in shape.targets(index))
    return lora + block.ia3 * (2 * shape.key_size + shape.intermediate_size)


@cost.num_tunables.register
def _num_tunables(shape: DecoderShape, segment: Segment) -> int:
    """Of a decoder only adapters train."""
    return _num_adapter_parameters(shape, segment)


@cost.kept_activations.register
def _kept_activations(shape: DecoderShape, segment: Segment) -> int:
    """Numbers that one example leaves in a segment for its backward pass.

    The head keeps 2 D for its norm and, a token, the probabilities of all V next tokens and their logits.
    """
    head = shape.num_tokens * (2 * shape.hidden_size + 2 * shape.num_labels)
    passed = range(max(segment.start, shape.lowest_tunable_block), segment.stop)
    return sum(_activations_of_block(shape, index) for index in passed) + segment.has_head * head


@cost.largest_activations.register
def _largest_activations(shape: DecoderShape, segment: Segment) -> int:
    """Numbers that one example needs in the largest part of a segment while that is computed."""
    blocks = max((_activations_of_block(shape, index) for index in segment.blocks), default=0)
    return max(blocks, segment.has_head * shape.num_tokens * shape.num_labels)


def _activations_of_block(shape: DecoderShape, index: int) -> int:
    """A token's: 6 D of norms and of what enters layers that have LoRA, 3 Q + 4 K of attention, 4 A I of the MLP.

    DoRA keeps 2 numbers more an output.
    """
    d, q, k, inner = shape.hidden_size, shape.query_size, shape.key_size, shape.active_experts * shape.intermediate_size
    dora = 2 * shape.of_block(index).has_magnitudes * sum(o for _, o in shape.targets(index))
    return shape.num_tokens * (6 * d + 3 * q + 4 * k + 4 * inner + dora)


@cost.forward_flops.register
def _forward_flops(shape: DecoderShape, segment: Segment, num_examples: int = 1) -> int:
    """An example: block 2 T (2 D (Q + K) + 3 A D I) + 4 T T Q, 2 T r (inputs + outputs) a LoRA target, head 2 T D V.

    DoRA multiplies its factors out, 4 r inputs outputs a target, once for all examples.
    """
    blocks = sum(_linear_flops(shape) + _attention_flops(shape) + _lora_flops(shape, i) for i in segment.blocks)
    return num_examples * (blocks + segment.has_head * _head_flops(shape)) + sum(
        _dora_flops(shape, index) for index in segment.blocks
    )


@cost.backward_flops.register
def _backward_flops(shape: DecoderShape, segment: Segment, num_examples: int = 1) -> int:
    """Frozen products cost once their forward pass, those of attention and of LoRA twice; below the lowest: nothing."""
    passed = range(max(segment.start, shape.lowest_tunable_block), segment.stop)
    blocks = sum(_linear_flops(shape) + 2 * _attention_flops(shape) + 2 * _lora_flops(shape, i) for i in passed)
    return num_examples * (blocks + segment.has_head * _head_flops(shape))


def _attention_weights(shape: DecoderShape) -> int:
    return 2 * shape.hidden_size * (shape.query_size + shape.key_size)


def _mlp_weights(shape: DecoderShape) -> int:
    return 3 * shape.hidden_size * shape.intermediate_size


def _linear_flops(shape: DecoderShape) -> int:
    return 2 * shape.num_tokens * (_attention_weights(shape) + shape.active_experts * _mlp_weights(shape))


def _attention_flops(shape: DecoderShape) -> int:
    return 4 * shape.num_tokens**2 * shape.query_size


def _lora_flops(shape: DecoderShape, index: int) -> int:
    rank = shape.of_block(index).lora_rank
    return 2 * shape.num_tokens * rank * sum(i + o for i, o in shape.targets(index))


def _dora_flops(shape: DecoderShape, index: int) -> int:
    block = shape.of_block(index)
    return 4 * block.lora_rank * block.has_magnitudes * sum(i * o for i, o in shape.targets(index))


def _head_flops(shape: DecoderShape) -> int:
    return 2 * shape.num_tokens * shape.hidden_size * shape.num_labels
