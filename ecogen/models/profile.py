"""The sizes of a model that planning and metering need, read off its configuration. Imports no torch."""

from __future__ import annotations

from typing import Any, Literal

from ecogen.config import Recipe
from ecogen.config import Tunables as TunablesSpec
from ecogen.planning.cost import ModelShape
from ecogen.planning.decoder_cost import DecoderShape

VISION = "vit"
"""The model type of vision transformers; all others are decoders of text."""

_EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts")
_EXPERT_SIZES = ("moe_intermediate_size", "expert_ffn_hidden_size", "intermediate_size", "ffn_hidden_size")


def shape_of(config: Any, recipe: Recipe, spec: TunablesSpec | None = None) -> ModelShape:
    """The shape of a recipe's model with its tunables, or with those of one cluster.

    Args:
        config: of transformers, or anything with its attributes.
    """
    spec = recipe.tunables if spec is None else spec
    if config.model_type == VISION:
        return model_shape(config, spec, recipe.wire.tokens)
    return decoder_shape(config, spec, recipe.model.context_length)


def model_shape(config: Any, spec: TunablesSpec, tokens: Literal["needed", "all"] = "needed") -> ModelShape:
    """The shape of a vision transformer with its tunables.

    Args:
        tokens: that the last block computes for a head.
    """
    patches = (config.image_size // config.patch_size) ** 2
    return ModelShape(
        num_blocks=config.num_hidden_layers,
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_tokens=patches + 1,
        patch_dim=config.num_channels * config.patch_size**2,
        num_labels=config.num_labels,
        tuned=tuple(spec.of_block(index) for index in range(config.num_hidden_layers)),
        prompts_stay=spec.prompt_depth == "shallow",
        head_trains=spec.head,
        norm=spec.backbone,
        all_tokens=tokens == "all",
    )


def decoder_shape(config: Any, spec: TunablesSpec, num_tokens: int) -> DecoderShape:
    """The shape of a decoder of text with its tunables; of a family that is not built as Llama is, an estimate.

    Args:
        num_tokens: of a passage.
    """
    heads, hidden = config.num_attention_heads, config.hidden_size
    width = getattr(config, "head_dim", None) or hidden // heads
    experts = next((n for name in _EXPERTS if (n := getattr(config, name, None))), 1)
    sizes = _EXPERT_SIZES if experts > 1 else _EXPERT_SIZES[2:]
    return DecoderShape(
        num_blocks=config.num_hidden_layers,
        hidden_size=hidden,
        intermediate_size=next(n for name in sizes if (n := getattr(config, name, None))),
        num_tokens=num_tokens,
        patch_dim=0,
        num_labels=config.vocab_size,
        tuned=tuple(spec.of_block(index) for index in range(config.num_hidden_layers)),
        head_trains=False,
        query_size=heads * width,
        key_size=(getattr(config, "num_key_value_heads", None) or heads) * width,
        ties=bool(getattr(config, "tie_word_embeddings", False)),
        num_experts=experts,
        active_experts=(getattr(config, "num_experts_per_tok", None) or 1) if experts > 1 else 1,
    )
