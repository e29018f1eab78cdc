"""How many numbers a model's weights have, counted from its config."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, Final

from kvqtool.config import ModelConfig
from kvqtool.errors import InputError, brief
from kvqtool.trunk import dense_width, read_trunk, shared_width
from kvqtool.weights import Part, Weights

# Decoders whose layers are attention and one feed-forward part, dense or of experts.
_DENSE: Final = (
    *("llama", "mistral", "ministral", "ministral3", "qwen2", "qwen3", "gemma", "gemma2"),
    *("gemma3_text", "phi", "phi3", "gpt_neox", "gptj", "gpt2", "opt", "bloom", "falcon", "glm"),
    *("glm4", "cohere", "cohere2", "olmo", "olmo2", "olmo3", "granite", "smollm3", "stablelm"),
    *("starcoder2", "ernie4_5", "exaone4", "seed_oss", "nanochat", "hunyuan_v1_dense"),
)
# Of experts: the field that says which layers are dense all the same is each one's own.
_EXPERTS: Final = (
    *("mixtral", "qwen2_moe", "qwen3_moe", "phimoe", "gpt_oss", "olmoe", "granitemoe"),
    *("minimax_m2", "llama4_text", "deepseek_v2", "deepseek_v3", "glm4_moe"),
)
# What only a config of experts has.
_EXPERT_FIELDS: Final = ("num_experts", "moe_intermediate_size")


def estimated_weights(config: ModelConfig, depth: int) -> Weights:
    """Count a model's weights from its config: within 0.2 % of what transformers makes of it.

    Raises:
        InputError: when the model type has parts that are not counted.
    """
    if config.model_type not in (*_DENSE, *_EXPERTS):
        raise InputError(
            f"the weights of {config.name} ({config.model_type}) cannot be estimated; "
            "name a folder with its safetensors files, or plan with --weights SIZE"
        )
    hidden, vocabulary = config.count("hidden_size"), config.count("vocab_size")
    is_tied = bool(config.get("tie_word_embeddings"))
    layers = tuple(
        Part(matrices=_attention(config) + _feed_forward(config, index), vectors=2 * hidden)
        for index in range(depth)
    )
    positions = config.count("max_position_embeddings") if _learns_positions(config) else 0
    tokens = Part(matrices=vocabulary * hidden)
    embedding = tokens + Part(matrices=positions * hidden)
    head = Part(vectors=hidden) if is_tied else tokens + Part(vectors=hidden)
    return Weights("estimate", embedding, layers, head, tokens if is_tied else Part())


def active_share(config: ModelConfig, depth: int) -> float | None:
    """Return the share of the weights that one token passes: below 1 where there are experts, None
    where those are not counted.
    """
    if config.model_type in _DENSE or not any(map(config.get, _EXPERT_FIELDS)):
        return 1.0
    chosen = config.at_least_zero("num_experts_per_tok")
    if config.model_type not in _EXPERTS or not 0 < chosen <= config.count("num_experts"):
        return None
    fewer = {"num_experts": chosen, "num_local_experts": chosen, "n_routed_experts": chosen}
    some = replace(config, stated=config.stated | fewer)
    return estimated_weights(some, depth).numbers / estimated_weights(config, depth).numbers


def _attention(config: ModelConfig) -> int:
    hidden, heads = config.count("hidden_size"), config.count("num_attention_heads")
    trunk = read_trunk(config)
    output = hidden * heads * trunk.value_dim
    if config.get("kv_lora_rank"):
        latent, rope = config.count("kv_lora_rank"), config.count("qk_rope_head_dim")
        spread = latent * heads * (config.count("qk_nope_head_dim") + trunk.value_dim)
        rank = config.optional("q_lora_rank")
        queries = heads * trunk.query_dim
        query = rank * (hidden + queries) if rank else hidden * queries
        return output + query + hidden * (latent + rope) + spread
    kv_heads = _kv_heads(config, heads)
    return output + hidden * (heads + 2 * kv_heads) * trunk.query_dim


def _kv_heads(config: ModelConfig, heads: int) -> int:
    if config.model_type == "falcon":
        if config.get("new_decoder_architecture"):
            return config.optional("num_kv_heads") or heads
        return 1 if config.get("multi_query") else heads
    if "num_key_value_heads" not in config.known:
        return heads
    return config.optional("num_key_value_heads") or heads


def _feed_forward(config: ModelConfig, index: int) -> int:
    hidden, dense = config.count("hidden_size"), dense_width(config)
    copies = 3 if read_trunk(config).is_gated else 2
    if config.model_type in _DENSE:
        return copies * hidden * dense
    if not _IS_SPARSE.get(config.model_type, _always)(config, index):
        return copies * hidden * (config.optional("intermediate_size_mlp") or dense)
    experts = config.count("num_experts")
    each = config.optional("moe_intermediate_size") or dense
    shared = dense if config.model_type == "llama4_text" else shared_width(config, each)
    return copies * hidden * (experts * each + shared) + hidden * experts


def _always(config: ModelConfig, index: int) -> bool:
    return True


def _after_first(config: ModelConfig, index: int) -> bool:
    return index >= config.at_least_zero("first_k_dense_replace")


def _qwen(config: ModelConfig, index: int) -> bool:
    return (
        index not in _listed(config, "mlp_only_layers")
        and (index + 1) % config.count("decoder_sparse_step") == 0
    )


def _llama4(config: ModelConfig, index: int) -> bool:
    if config.get("moe_layers") is not None:
        return index in _listed(config, "moe_layers")
    return (index + 1) % config.count("interleave_moe_layer_step") == 0


def _listed(config: ModelConfig, field: str) -> list[Any]:
    """Return a field that lists layers."""
    listed = config.get(field) or []
    if not isinstance(listed, list):
        raise InputError(f"the config of {config.name} has {field} = {brief(listed)}")
    return listed


def _learns_positions(config: ModelConfig) -> bool:
    return config.model_type in ("gpt2", "opt")


_IS_SPARSE: Final[dict[str, Callable[[ModelConfig, int], bool]]] = {
    "deepseek_v2": _after_first,
    "deepseek_v3": _after_first,
    "glm4_moe": _after_first,
    "llama4_text": _llama4,
    "qwen2_moe": _qwen,
    "qwen3_moe": _qwen,
}
