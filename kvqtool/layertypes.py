"""Which type each layer is where a config does not list `layer_types`: the pattern of its class."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

from kvqtool.config import ModelConfig
from kvqtool.errors import InputError, brief

FULL, SLIDING, CHUNKED, LINEAR = (
    *("full_attention", "sliding_attention", "chunked_attention", "linear_attention"),
)
_LEGACY: Final = {
    "attention": FULL,
    "mamba": LINEAR,
    "deepseek_sparse_attention": "indexed_attention",
}
_DEEPEST: Final = 10_000
_NEMOTRON: Final = {"M": LINEAR, "*": FULL, "-": "mlp", "E": "moe"}


def layer_types(config: ModelConfig) -> list[str]:
    """Return each layer's type, as transformers names them.

    Raises:
        InputError: when the config does not say how many layers there are, or what they are.
    """
    listed: Any = config.get("layer_types") or config.stated.get("layers_block_type")
    if listed:
        if not isinstance(listed, list) or not all(isinstance(name, str) for name in listed):
            raise InputError(f"the config of {config.name} has layer_types = {brief(listed)}")
        depth = config.get("num_hidden_layers")
        if depth not in (None, len(listed)) and config.model_type != "nemotron_h":
            found = f"{config.name} lists {len(listed)} layer_types for {brief(depth)} layers"
            raise InputError(f"{found}; correct its config")
        return [_LEGACY.get(name) or name for name in listed]
    if config.model_type == "nemotron_h":
        return _nemotron_types(config)
    pattern, depth = _PATTERNS.get(config.model_type, _by_window), config.count("num_hidden_layers")
    if depth > _DEEPEST:
        raise InputError(f"{config.name} has {depth} layers; more than {_DEEPEST} are not planned")
    return [pattern(config, index) for index in range(depth)]


def has_rope(config: ModelConfig, index: int) -> bool:
    """Return whether a layer of a model that leaves some without positions rotates its keys."""
    listed = config.get("no_rope_layers")
    if not listed:
        return bool((index + 1) % config.count("no_rope_layer_interval"))
    if not isinstance(listed, list) or index >= len(listed):
        raise InputError(f"the config of {config.name} has no_rope_layers = {brief(listed)}")
    return bool(listed[index])


def _by_window(config: ModelConfig, index: int) -> str:
    return FULL if config.get("sliding_window") is None else SLIDING


def _every(
    period: int, other: str = SLIDING, stated_by: str | None = None
) -> Callable[[ModelConfig, int], str]:
    """Make a pattern whose every `period`-th layer sees all; a field may state another period."""

    def pattern(config: ModelConfig, index: int) -> str:
        stated = config.optional(stated_by) if stated_by else None
        return other if (index + 1) % (stated or period) else FULL

    return pattern


def _exaone(config: ModelConfig, index: int) -> str:
    has_window = config.get("sliding_window") is not None
    return _every(4, SLIDING, "sliding_window_pattern")(config, index) if has_window else FULL


def _gemma4(config: ModelConfig, index: int) -> str:
    is_last = index == config.count("num_hidden_layers") - 1
    return SLIDING if (index + 1) % 6 and not is_last else FULL


def _qwen(config: ModelConfig, index: int) -> str:
    has_window = config.get("use_sliding_window") and config.get("sliding_window") is not None
    return SLIDING if has_window and index >= config.count("max_window_layers") else FULL


def _llama4(config: ModelConfig, index: int) -> str:
    return CHUNKED if has_rope(config, index) else FULL


def _smollm3(config: ModelConfig, index: int) -> str:
    has_window = config.get("use_sliding_window") and config.get("sliding_window") is not None
    return SLIDING if has_window and not has_rope(config, index) else FULL


def _jamba(config: ModelConfig, index: int) -> str:
    is_full = index % config.count("attn_layer_period") == config.get("attn_layer_offset")
    return FULL if is_full else LINEAR


def _lfm2(config: ModelConfig, index: int) -> str:
    chosen = config.get("full_attn_idxs")
    if chosen is not None and not isinstance(chosen, list):
        raise InputError(f"the config of {config.name} has full_attn_idxs = {brief(chosen)}")
    return FULL if chosen is None or index in chosen else "conv"


def _nemotron_types(config: ModelConfig) -> list[str]:
    letters = config.stated.get("hybrid_override_pattern") or "ME*-"
    if not isinstance(letters, str) or set(letters) - set(_NEMOTRON):
        raise InputError(f"the config of {config.name} has layers {brief(letters)}; known: ME*-")
    return [_NEMOTRON[letter] for letter in letters]


_ALTERNATE: Final = _every(2)
_QWEN_HYBRID: Final = _every(4, LINEAR, "full_attention_interval")
_PATTERNS: Final[dict[str, Callable[[ModelConfig, int], str]]] = {
    "cohere2": _every(4, SLIDING, "sliding_window_pattern"),
    "deepseek_v32": lambda config, index: "indexed_attention",
    "exaone4": _exaone,
    "falcon_h1": lambda config, index: "hybrid",
    "gemma2": _ALTERNATE,
    "gemma3_text": _every(6, SLIDING, "sliding_window_pattern"),
    "gemma3n_text": _every(5),
    "gemma4_text": _gemma4,
    "glm_moe_dsa": lambda config, index: "indexed_attention",
    "gpt_oss": _ALTERNATE,
    "granitemoehybrid": lambda config, index: LINEAR,
    "jamba": _jamba,
    "lfm2": _lfm2,
    "llama4_text": _llama4,
    "minimax": lambda config, index: LINEAR if index % 2 else FULL,
    "olmo3": _every(4),
    "qwen2": _qwen,
    "qwen2_moe": _qwen,
    "qwen3": _qwen,
    "qwen3_moe": _qwen,
    "qwen3_5_moe_text": _QWEN_HYBRID,
    "qwen3_5_text": _QWEN_HYBRID,
    "qwen3_next": _QWEN_HYBRID,
    "smollm3": _smollm3,
}
