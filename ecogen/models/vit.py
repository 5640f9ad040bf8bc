"""A vision transformer seen as segments: only the own blocks exist, under the whole model's names.

Shapes: B batch, C channels, H height, W width, T tokens with CLS, T' those with prompts, D hidden, L labels.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import ViTConfig, ViTForImageClassification
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.vit.modeling_vit import ViTLayer, eager_attention_forward

from ecogen.errors import CheckpointError
from ecogen.placement import Segment


class Hole(nn.Module):
    """Stands where another node holds the module; calling it is our mistake."""

    def forward(self, *_: object, **__: object) -> Tensor:
        raise RuntimeError("this part of the model is on another node")


class LastBlock(ViTLayer):
    """The block below the head, which looks at CLS only: so queries, and all that follows attention, are CLS's."""

    def forward(self, hidden_states: Tensor, *args: Any, cls_only: bool = False, **kwargs: Any) -> Tensor:
        """As any block, [B, T', D]; with `cls_only` the first token of that, [B, 1, D]."""
        if not cls_only:
            whole: Tensor = super().forward(hidden_states, *args, **kwargs)
            return whole
        normed, attention = self.layernorm_before(hidden_states), self.attention
        queries, keys, values = (
            projection(tokens).unflatten(-1, (-1, attention.head_dim)).transpose(1, 2)
            for projection, tokens in (
                (attention.q_proj, normed[:, :1]),
                (attention.k_proj, normed),
                (attention.v_proj, normed),
            )
        )
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(attention.config._attn_implementation, eager_attention_forward)
        mixed, _ = attend(attention, queries, keys, values, None, dropout=0.0, scaling=attention.scaling)
        cls = hidden_states[:, :1] + attention.o_proj(mixed.flatten(2))
        return cls + self.mlp(self.layernorm_after(cls))


class SegmentedViT(nn.Module):
    """The parts of a `ViTForImageClassification` that one node holds.

    Attributes:
        whole: the transformers model with holes for what others hold, so that names, indices and PEFT see
            the whole model.
        gives_all_tokens: whether the last block computes every token and a head on another node is sent them, as
            plain split learning does, though a head looks at CLS only.
    """

    def __init__(self, whole: ViTForImageClassification, segments: Sequence[Segment]) -> None:
        super().__init__()
        self.whole = whole
        self.segments = tuple(segments)
        self.gives_all_tokens = False

    def forward(self, inputs: Tensor, segment: Segment) -> Tensor:
        """Run one held segment.

        Args:
            inputs: pixels [B, C, H, W] where the segment has the embedding, else activations [B, T, D].

        Returns:
            Logits [B, L] where the segment has the head, else activations: [B, T, D], of which only CLS, [B, 1, D],
            goes to a head that is alone.
        """
        hidden = self.whole.vit.embeddings(inputs) if segment.has_embedding else inputs
        for index in segment.blocks:
            how = {"cls_only": not self.gives_all_tokens} if index == len(self.whole.vit.layers) - 1 else {}
            hidden = self.whole.vit.layers[index](hidden, **how)
        if segment.has_head:
            logits: Tensor = self.whole.classifier(self.whole.vit.layernorm(hidden[:, :1])[:, 0])
            return logits
        is_last = segment.stop == len(self.whole.vit.layers)
        return hidden[:, :1] if is_last and not self.gives_all_tokens else hidden


def empty_vit(config: ViTConfig, segments: Sequence[Segment]) -> SegmentedViT:
    """The segments' modules without storage, on the meta device; everything else is a hole."""
    with torch.device("meta"):
        whole = ViTForImageClassification(config)
        whole.vit.layers[-1] = LastBlock(config)
    held = {block for segment in segments for block in segment.blocks}
    for index in set(range(config.num_hidden_layers)) - held:
        whole.vit.layers[index] = Hole()
    if not any(segment.has_embedding for segment in segments):
        whole.vit.embeddings = Hole()
    if not any(segment.has_head for segment in segments):
        whole.vit.layernorm = whole.classifier = Hole()
    return SegmentedViT(whole.eval(), segments)


def parameter_names(config: ViTConfig, segments: Sequence[Segment]) -> list[str]:
    """The whole model's names of what the segments hold."""
    return list(empty_vit(config, segments).whole.state_dict())


def load_vit(config: ViTConfig, segments: Sequence[Segment], tensors: Mapping[str, Tensor]) -> SegmentedViT:
    """The segments with their weights; the tensors become the parameters without a copy.

    Raises:
        CheckpointError: if a tensor is missing, left over or of another shape.
    """
    model = empty_vit(config, segments)
    try:
        model.whole.load_state_dict(dict(tensors), strict=True, assign=True)
    except RuntimeError as problem:
        raise CheckpointError(f"the checkpoint does not fit {describe(segments)}: {problem}") from problem
    return model.requires_grad_(False)


def whole_segment(config: ViTConfig) -> Segment:
    """The segment that is the whole model."""
    return Segment(0, config.num_hidden_layers, has_embedding=True, has_head=True)


def describe(segments: Sequence[Segment]) -> str:
    """The segments in words."""
    return "; ".join(str(segment) for segment in segments)
