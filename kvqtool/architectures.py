"""From a config to the kind and shapes of every cache layer, by the rules of each architecture.

The rules are those by which transformers builds its own cache, and tests run every one of them
against it. What has no rule is refused, by name.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Final

from kvqtool.config import ModelConfig
from kvqtool.errors import InputError, brief
from kvqtool.layers import PACKED_KINDS, Angles, CacheLayer
from kvqtool.layertypes import has_rope, layer_types
from kvqtool.memory import LayerGeometry
from kvqtool.states import linear_states

_KIND_OF: Final = {
    "full_attention": "full",
    "sliding_attention": "sliding",
    "chunked_attention": "chunked",
    "indexed_attention": "indexed",
    "linear_attention": "linear",
    "conv": "linear",
    "hybrid": "hybrid",
    "moe": "none",
    "mlp": "none",
}
# One latent for all heads (MLA), in place of keys and values.
LATENT: Final = (*("deepseek_v2", "deepseek_v3", "deepseek_v32", "glm4_moe_lite", "glm_moe_dsa"),)
# Keys that kvqtool stores as they come: no rotation reaches the cache, or none can be undone.
_UNROTATED: Final = (
    *("bloom", "gpt2", "gptj", "opt", "jamba", "nemotron_h", "hunyuan_v1_dense"),
    "granitemoehybrid",
)
_SLIDING_ROTATES_ALONE: Final = ("cohere2", "exaone4")
_LISTS_ROTATED: Final = ("llama4_text", "smollm3")
# Share of a head's channels that is rotated, where the config does not say.
_PARTIAL: Final = {
    **dict.fromkeys(("phi", "glm", "glm4", "glm4_moe"), 0.5),
    **dict.fromkeys(("stablelm", "gpt_neox", "qwen3_next"), 0.25),
    **dict.fromkeys(("qwen3_5_text", "qwen3_5_moe_text"), 0.25),
}
_LOCAL_ANGLES: Final = ("gemma3_text", "gemma3n_text", "gemma4_text")


def cache_layers(config: ModelConfig) -> tuple[CacheLayer, ...]:
    """Return every layer's cache.

    Raises:
        InputError: when the config lacks or garbles what decides it.
    """
    types = layer_types(config)
    shared_from = len(types) - config.at_least_zero("num_kv_shared_layers")
    layers = []
    for index, name in enumerate(types):
        if name not in _KIND_OF:
            known = ", ".join(_KIND_OF)
            raise InputError(f"{config.name} has a layer of type {brief(name)}; known: {known}")
        kind = "shared" if index >= shared_from else _KIND_OF[name]
        if kind == "full" and config.model_type in LATENT:
            kind = "latent"
        layers.append(_layer(_of_layer(config, index, kind), index, kind))
    if not any(layer.is_growing for layer in layers):
        raise InputError(f"{config.name} ({config.model_type}) has no attention layer to plan for")
    return tuple(layers)


def _of_layer(config: ModelConfig, index: int, kind: str) -> ModelConfig:
    """Return the config of one layer, where layers may differ."""
    per_layer = config.stated.get("per_layer_config")
    if isinstance(per_layer, dict):
        own = per_layer.get(str(index))
    elif config.model_type == "gemma4_text" and kind == "full":
        heads = config.get("num_global_key_value_heads") if config.get("attention_k_eq_v") else None
        own = {"head_dim": config.stated.get("global_head_dim", 512)}
        own |= {"num_key_value_heads": heads} if heads else {}
    else:
        return config
    return replace(config, stated=config.stated | own) if isinstance(own, dict) else config


def _layer(config: ModelConfig, index: int, kind: str) -> CacheLayer:
    if kind in ("shared", "none"):
        return CacheLayer(kind)
    states = linear_states(config) if kind in ("linear", "hybrid") else ()
    if kind == "linear":
        return CacheLayer(kind, states=states)
    geometry = _geometry(config)
    window = _window(config, kind)
    rotated = kind in PACKED_KINDS and _is_rotated(config, index, kind)
    return CacheLayer(
        kind=kind,
        geometry=geometry,
        window=window,
        angles=_angles(config, kind, geometry) if rotated else None,
        states=states,
        index_channels=config.count("index_head_dim") if kind == "indexed" else 0,
    )


def _window(config: ModelConfig, kind: str) -> int | None:
    field = {"sliding": "sliding_window", "chunked": "attention_chunk_size"}.get(kind)
    if field is None:
        return None
    window = config.count(field)
    if window < 2:
        raise InputError(f"the config of {config.name} has {field} = 1, which sees no other token")
    return window


def _geometry(config: ModelConfig) -> LayerGeometry:
    if config.model_type in LATENT:
        return LayerGeometry(1, config.count("kv_lora_rank"), config.count("qk_rope_head_dim"))
    heads, kv_heads = config.count("num_attention_heads"), None
    if "num_key_value_heads" in config.known:
        kv_heads = config.optional("num_key_value_heads")
    if config.model_type == "falcon":
        # New falcons copy a key to all its queries before it is cached.
        copies = config.get("new_decoder_architecture") or not config.get("multi_query")
        kv_heads = heads if copies else 1
    head_dim = None if config.model_type == "cohere2" else config.optional("head_dim")
    if head_dim is None:
        hidden = config.count("hidden_size")
        if hidden % heads:
            found = f"hidden_size {hidden} of {config.name} is not a multiple of its {heads} heads"
            raise InputError(f"{found}; state head_dim")
        head_dim = hidden // heads
    return LayerGeometry(kv_heads or heads, head_dim, head_dim)


def _is_rotated(config: ModelConfig, index: int, kind: str) -> bool:
    if config.model_type in _UNROTATED or config.get("alibi"):
        return False
    if config.model_type in _SLIDING_ROTATES_ALONE and config.get("sliding_window") is not None:
        return kind == "sliding"
    return config.model_type not in _LISTS_ROTATED or has_rope(config, index)


def _angles(config: ModelConfig, kind: str, geometry: LayerGeometry) -> Angles:
    rope = _rope(config, kind)
    share = rope.get("partial_rotary_factor") or _PARTIAL.get(config.model_type, 1.0)
    if not isinstance(share, (int, float)) or not 0 < share <= 1:
        found = f"the config of {config.name} has partial_rotary_factor = {brief(share)}"
        raise InputError(f"{found}; expected a share of a head, above 0 and up to 1")
    width = int(geometry.key_dim * share)
    after = None
    if config.model_type == "llama4_text":
        after = 0  # its angles are complex numbers, which no formula of ours makes bit for bit
    elif (rope.get("rope_type") or rope.get("type")) in ("dynamic", "longrope", "su"):
        # Past the length they were pretrained for, these change the angles of all tokens.
        lengths = (
            rope.get("original_max_position_embeddings"),
            config.get("original_max_position_embeddings"),
            config.get("max_position_embeddings"),
        )
        after = next((length for length in lengths if type(length) is int), 0)
    return Angles(repr(sorted(rope.items())), width - width % 2, after)


def _rope(config: ModelConfig, kind: str) -> dict[str, Any]:
    """Return what decides a layer's angles: equal dicts, equal angles."""
    name = "full_attention" if kind == "full" else "sliding_attention"
    stated = config.get("rope_parameters")
    stated = stated if isinstance(stated, dict) else {}
    if isinstance(stated.get(name), dict):
        return dict(stated[name])
    scaling = config.get("rope_scaling")
    scaling = scaling if isinstance(scaling, dict) else {}
    if kind == "sliding" and config.model_type in _LOCAL_ANGLES:
        return {"rope_theta": config.get("rope_local_base_freq") or 10_000.0}
    if kind == "sliding" and config.model_type == "olmo3":
        scaling = {}
    rope = stated | scaling
    factor = config.get("partial_rotary_factor") or config.get("rotary_pct")
    return rope | {"partial_rotary_factor": factor} if factor else rope
