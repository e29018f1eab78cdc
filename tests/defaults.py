"""Write kvqtool/defaults.json: what a config.json leaves to its class, taken from transformers.

`python tests/defaults.py` writes it; tests/test_architectures.py compares it with the transformers
that is installed.
"""

from __future__ import annotations

import json
from dataclasses import MISSING
from pathlib import Path
from typing import Any, Final

import transformers
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

PAGE: Final = Path(__file__).parents[1] / "kvqtool" / "defaults.json"
# What planning reads of a config; of these, each class has some.
FIELDS: Final = (
    *("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads"),
    *("head_dim", "intermediate_size", "vocab_size", "max_position_embeddings"),
    *("tie_word_embeddings", "sliding_window", "use_sliding_window", "max_window_layers"),
    *("sliding_window_pattern", "layer_types", "attention_chunk_size", "no_rope_layers"),
    *("no_rope_layer_interval", "num_kv_shared_layers", "attention_k_eq_v", "kv_lora_rank"),
    *("q_lora_rank", "qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim", "index_head_dim"),
    *("linear_conv_kernel_dim", "linear_key_head_dim", "linear_value_head_dim"),
    *("linear_num_key_heads", "linear_num_value_heads", "mamba_d_state", "mamba_d_conv"),
    *("mamba_expand", "mamba_n_heads", "mamba_d_head", "mamba_n_groups", "mamba_d_ssm"),
    *("ssm_state_size", "mamba_num_heads", "mamba_head_dim", "n_groups", "conv_kernel"),
    *("conv_L_cache", "full_attn_idxs", "attn_layer_period", "attn_layer_offset"),
    *("multi_query", "new_decoder_architecture", "num_kv_heads", "alibi", "ffn_hidden_size"),
    *("ffn_dim", "word_embed_proj_dim", "n_embd", "n_layer", "n_head", "n_positions", "n_inner"),
    *("intermediate_size_mlp", "interleave_moe_layer_step", "moe_layers", "num_local_experts"),
    *("num_experts", "n_routed_experts", "n_shared_experts", "num_experts_per_tok"),
    *("moe_intermediate_size", "shared_expert_intermediate_size", "first_k_dense_replace"),
    *("decoder_sparse_step", "mlp_only_layers", "expert_layer_period", "expert_layer_offset"),
)
MODEL_TYPES: Final = (
    *("llama", "mistral", "ministral", "ministral3", "mixtral", "qwen2", "qwen2_moe", "qwen3"),
    *("qwen3_moe", "qwen3_next", "qwen3_5_text", "qwen3_5_moe_text", "gemma", "gemma2"),
    *("gemma3_text", "gemma3n_text", "gemma4_text", "phi", "phi3", "phimoe", "gpt_oss"),
    *("gpt_neox", "gptj", "gpt2", "opt", "bloom", "falcon", "glm", "glm4", "glm4_moe"),
    *("glm4_moe_lite", "glm_moe_dsa", "cohere", "cohere2", "olmo", "olmo2", "olmo3", "olmoe"),
    *("granite", "granitemoe", "granitemoehybrid", "smollm3", "stablelm", "starcoder2"),
    *("ernie4_5", "ernie4_5_moe", "exaone4", "llama4_text", "deepseek_v2", "deepseek_v3"),
    *("deepseek_v32", "jamba", "minimax", "minimax_m2", "lfm2", "falcon_h1", "nemotron_h"),
    *("seed_oss", "nanochat", "hunyuan_v1_dense"),
)


def class_defaults(model_type: str) -> dict[str, Any]:
    """Return what a class gives each of FIELDS that it has and a config.json does not state."""
    known = CONFIG_MAPPING[model_type].__dataclass_fields__
    return {
        field: known[field].default
        for field in FIELDS
        if field in known and known[field].default is not MISSING
    }


def page() -> str:
    """Return defaults.json: a line for each model type."""
    rows = [f'"{name}": {json.dumps(class_defaults(name))}' for name in sorted(MODEL_TYPES)]
    head = f'"transformers": "{transformers.__version__}"'
    return "{" + ",\n".join([head, *rows]) + "}\n"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
