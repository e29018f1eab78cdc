"""One tiny config for every model type that can be planned, and the cache transformers makes of it.

Where tests/families.py has a family already, its options are used.
"""

from __future__ import annotations

from typing import Any, Final

import torch
import transformers
from families import FAMILIES, HEADED, MLA, MOE, SIZES, VOCABULARY, tokens
from transformers import PretrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

HYBRID: Final[dict[str, Any]] = {
    **FAMILIES["qwen3_next"][1],
    "layer_types": ["linear_attention", "full_attention"],
}
INDEXED: Final[dict[str, Any]] = MLA | {
    "index_topk": 8,
    "index_head_dim": 24,
    "index_n_heads": 2,
    "n_shared_experts": 1,
}
GEMMA4: Final[dict[str, Any]] = HEADED | {
    "num_hidden_layers": 4,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
    "sliding_window": 8,
    "global_head_dim": 32,
    "hidden_size_per_layer_input": 8,
    "vocab_size_per_layer_input": VOCABULARY,
}
EXPERTS: Final[dict[str, Any]] = {"num_local_experts": 4, "num_experts_per_tok": 2}
MAMBA2: Final[dict[str, Any]] = {"mamba_n_heads": 4, "mamba_d_state": 24, "mamba_n_groups": 1}
DEPTH: Final = {"num_hidden_layers": 6}
# name -> (model type, options): what tests/families.py does not have, and what is left to a class.
EXTRA: Final[dict[str, tuple[str, dict[str, Any]]]] = {
    "mistral (no window)": ("mistral", HEADED | {"sliding_window": None}),
    "ministral": ("ministral", HEADED | {"sliding_window": 8}),
    "ministral3": ("ministral3", HEADED),
    "qwen2 (window above layer 1)": (
        "qwen2",
        SIZES | DEPTH | {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 2},
    ),
    "qwen2 (window off)": ("qwen2", SIZES | {"use_sliding_window": False, "sliding_window": 8}),
    "qwen3_next (by interval)": (
        "qwen3_next",
        {k: v for k, v in HYBRID.items() if k != "layer_types"} | {"num_hidden_layers": 4},
    ),
    "qwen3_5": ("qwen3_5_text", HYBRID),
    "qwen3_5_moe": ("qwen3_5_moe_text", HYBRID),
    "gemma2 (types by class)": ("gemma2", HEADED | DEPTH | {"sliding_window": 8}),
    "gemma3 (types by class)": ("gemma3_text", HEADED | DEPTH | {"sliding_window": 8}),
    "gemma3 (pattern of 3)": (
        "gemma3_text",
        HEADED | DEPTH | {"sliding_window": 8, "sliding_window_pattern": 3},
    ),
    "gemma4": ("gemma4_text", GEMMA4),
    "gemma4 (shared)": ("gemma4_text", GEMMA4 | {"num_kv_shared_layers": 2}),
    "gemma4 (one head everywhere)": (
        "gemma4_text",
        GEMMA4 | {"attention_k_eq_v": True, "num_global_key_value_heads": 1},
    ),
    "gemma4 (types by class)": (
        "gemma4_text",
        {k: v for k, v in GEMMA4.items() if k != "layer_types"} | DEPTH,
    ),
    "phimoe": ("phimoe", SIZES | EXPERTS),
    "glm": ("glm", HEADED),
    "glm4_moe": (
        "glm4_moe",
        HEADED | MOE | {"n_routed_experts": 4, "n_group": 1, "topk_group": 1},
    ),
    "glm4_moe_lite": ("glm4_moe_lite", MLA),
    "glm_moe_dsa": ("glm_moe_dsa", INDEXED),
    "deepseek_v32": ("deepseek_v32", INDEXED),
    "cohere2 (types by class)": ("cohere2", SIZES | DEPTH | {"sliding_window": 8}),
    "olmo": ("olmo", SIZES),
    "olmo3 (types by class)": ("olmo3", SIZES | DEPTH | {"sliding_window": 8}),
    "olmoe": ("olmoe", SIZES | MOE),
    "granitemoe": ("granitemoe", SIZES | EXPERTS),
    "granitemoehybrid": (
        "granitemoehybrid",
        SIZES
        | EXPERTS
        | MAMBA2
        | {"layer_types": ["mamba", "attention"], "shared_intermediate_size": 32},
    ),
    "ernie4_5_moe": (
        "ernie4_5_moe",
        HEADED | {"moe_num_experts": 4, "moe_k": 2, "moe_intermediate_size": 32},
    ),
    "exaone4 (no window)": (
        "exaone4",
        SIZES | {"sliding_window": None, "layer_types": ["full_attention"] * 2},
    ),
    "exaone4 (types by class)": ("exaone4", SIZES | DEPTH | {"sliding_window": 8}),
    "llama4 (chunks by interval)": (
        "llama4_text",
        HEADED
        | {
            "num_hidden_layers": 4,
            "intermediate_size_mlp": 96,
            "num_local_experts": 2,
            "attention_chunk_size": 16,
        },
    ),
    "gpt_oss (types by class)": (
        "gpt_oss",
        HEADED | DEPTH | EXPERTS | {"sliding_window": 8},
    ),
    "falcon (new)": (
        "falcon",
        SIZES | {"new_decoder_architecture": True, "num_kv_heads": 2, "multi_query": False},
    ),
    "falcon (every head)": ("falcon", SIZES | {"multi_query": False}),
    "jamba": (
        "jamba",
        SIZES
        | {
            "num_hidden_layers": 3,
            "attn_layer_period": 3,
            "attn_layer_offset": 1,
            "num_experts": 2,
            "mamba_d_state": 24,
            "mamba_dt_rank": 8,
        },
    ),
    "minimax": ("minimax", HEADED | EXPERTS | {"num_hidden_layers": 4, "block_size": 8}),
    "minimax_m2": ("minimax_m2", HEADED | EXPERTS),
    "lfm2": ("lfm2", SIZES | {"full_attn_idxs": [1], "block_auto_adjust_ff_dim": False}),
    "falcon_h1": ("falcon_h1", HEADED | MAMBA2 | {"mamba_d_ssm": 64, "mamba_d_head": 16}),
    "nemotron_h": (
        "nemotron_h",
        HEADED
        | {
            "num_hidden_layers": 4,
            "hybrid_override_pattern": "M*-M",
            "mamba_num_heads": 8,
            "mamba_head_dim": 16,
            "ssm_state_size": 24,
            "n_groups": 2,
        },
    ),
    "seed_oss": ("seed_oss", HEADED),
    "smollm3 (window)": (
        "smollm3",
        SIZES | DEPTH | {"use_sliding_window": True, "sliding_window": 8},
    ),
}


def vectors() -> dict[str, tuple[str, dict[str, Any]]]:
    """Return every vector: name -> (model type, options)."""
    shared = {
        name: (getattr(transformers, config_class).model_type, options)
        for name, (config_class, options) in FAMILIES.items()
    }
    return shared | EXTRA


def own_cache(model_type: str, options: dict[str, Any], length: int = 20) -> tuple[Any, Any]:
    """Run a random bfloat16 model on two sequences; return its config and the cache it leaves."""
    config: PretrainedConfig = CONFIG_MAPPING[model_type](**options)
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        model = transformers.AutoModelForCausalLM.from_config(config).to(torch.bfloat16).eval()
        first = model(tokens(2, length), use_cache=True).past_key_values
        return config, model(tokens(2, 1), past_key_values=first, use_cache=True).past_key_values
