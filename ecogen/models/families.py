"""The model types of transformers that can be cut into segments: those for which a chain equals the whole model.

`tests/models/test_decoder_families.py` shows it for each of them; what it does not show is refused, with the reason.
"""

from __future__ import annotations

ACCEPTED = frozenset(
    [
        "afmoe",
        "apertus",
        "arcee",
        "aria_text",
        "axk1",
        "axk2",
        "bailing_hybrid",
        "beam",
        "cohere",
        "cohere2",
        "cohere2_moe",
        "cohere_compass_text",
        "cwm",
        "deepseek_v2",
        "deepseek_v3",
        "deepseek_v32",
        "doge",
        "dots1",
        "ernie4_5",
        "ernie4_5_moe",
        "exaone4",
        "exaone_moe",
        "flex_olmo",
        "flint",
        "gemma",
        "gemma2",
        "gemma3_text",
        "gemma4_unified_text",
        "glm",
        "glm4",
        "glm4_moe",
        "glm4_moe_lite",
        "glm_moe_dsa",
        "gpt_neox",
        "gpt_oss",
        "granite",
        "granite_swa",
        "helium",
        "hy_v3",
        "hy_v4",
        "hyperclovax",
        "inkling_text",
        "internlm3",
        "iquestcoder",
        "jais2",
        "kimi_linear",
        "kolibri1",
        "laguna",
        "llama",
        "longcat_flash",
        "mellum",
        "mimo_v2_flash",
        "minicpm3",
        "minimax_m2",
        "minimax_m3_vl_text",
        "ministral",
        "ministral3",
        "mistral",
        "mixtral",
        "olmo",
        "olmo2",
        "olmo3",
        "olmo_hybrid",
        "phi",
        "phi3",
        "qwen2",
        "qwen2_moe",
        "qwen3",
        "qwen3_5_moe_text",
        "qwen3_5_text",
        "qwen3_moe",
        "qwen3_next",
        "seed_oss",
        "smollm3",
        "solar_open",
        "starcoder2",
        "vaultgemma",
        "youtu",
    ]
)

REFUSED = {
    "deepseek_v4": "its blocks choose experts by token ids, which only the first segment sees",
    "gemma3n_text": "its blocks pass four states, and each takes an embedding of the tokens of its own",
    "gemma4_text": "each of its blocks takes an embedding of the tokens of its own, which only the first segment sees",
    "hrm_text": "it has no single list of blocks",
    "minimax": "it keeps a cache of its own kind",
    "phi4_multimodal": "its adapters are built in",
}
"""Why."""


def refusal(model_type: str) -> str | None:
    """Why a model type is not accepted; None where it is."""
    if model_type in ACCEPTED:
        return None
    return REFUSED.get(model_type, "it is not among the types for which a chain is known to equal the whole model")
