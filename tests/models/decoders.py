"""Tiny random decoders of every accepted type, with the settings that hide mistakes when left at their defaults."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from ecogen.models.decoder import align

NUM_BLOCKS = 6

TINY: dict[str, Any] = {
    "vocab_size": 99,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": NUM_BLOCKS,
    "num_layers": NUM_BLOCKS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "tie_word_embeddings": True,
    # windows shorter than the prompts
    "sliding_window": 7,
    "use_sliding_window": True,
    "max_window_layers": 2,
    # multipliers that are not one
    "embedding_multiplier": 12.0,
    "residual_multiplier": 0.7,
    "attention_multiplier": 0.2,
    "logits_scaling": 3.0,
    "logit_scale": 0.3,
    # experts
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 32,
    "shared_experts_intermediate_size": 32,
    "n_shared_experts": 1,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    # latent attention
    "q_lora_rank": 24,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 16,
    "v_head_dim": 16,
    "index_head_dim": 16,
    "index_n_heads": 2,
    "index_topk": 5,
    # recurrent blocks
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_conv_kernel_dim": 4,
    "linear_head_dim": 16,
    "linear_num_heads": 4,
}

_PLAIN_ROPE = {"rope_type": "default", "rope_theta": 10000.0}

SPECIAL: dict[str, dict[str, Any]] = {
    "cohere_compass_text": {
        "layer_types": ["sliding_attention", "full_attention"] * 3,
        "rope_parameters": {"sliding_attention": _PLAIN_ROPE, "full_attention": _PLAIN_ROPE},
        "head_dim": None,
    },
    "longcat_flash": {
        "zero_expert_num": 2,
        "ffn_hidden_size": 96,
        "expert_ffn_hidden_size": 32,
        "moe_topk": 2,
        "head_dim": 8,
        "num_hidden_layers": None,
        "intermediate_size": None,
        "moe_intermediate_size": None,
        "num_experts_per_tok": None,
        "num_local_experts": None,
    },
}
"""What a type wants otherwise; None for what it must not be given."""


def tiny_config(model_type: str, **changes: Any) -> PreTrainedConfig:
    """A configuration of six narrow blocks."""
    kind = CONFIG_MAPPING[model_type]
    known = {name for part in kind.__mro__ for name in getattr(part, "__annotations__", {})}
    values = {name: value for name, value in TINY.items() if name in known}
    if "kv_lora_rank" in values:
        values["num_key_value_heads"] = values["num_attention_heads"]
    values |= SPECIAL.get(model_type, {}) | changes
    return kind(**{name: value for name, value in values.items() if value is not None})


def save_decoder(model_type: str, folder: Path, **changes: Any) -> PreTrainedModel:
    """A model with no weight at zero or one, saved; as it is read again, and laid out in memory as segments are."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(tiny_config(model_type, **changes))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape))
    model.save_pretrained(folder, max_shard_size="100KB")
    whole = AutoModelForCausalLM.from_pretrained(folder).eval().requires_grad_(False)
    align(whole)
    return whole
