"""What a linear-attention or state-space layer keeps of a sequence: arrays that do not grow."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from kvqtool.config import ModelConfig
from kvqtool.layers import State


def linear_states(config: ModelConfig) -> tuple[State, ...]:
    """Return the arrays of one linear layer; a model type without such layers has none."""
    rule = _STATES.get(config.model_type)
    return rule(config) if rule else ()


def _delta_net(config: ModelConfig) -> tuple[State, ...]:
    """Qwen3-Next and 3.5: a short convolution of q, k and v, and a matrix for each value head."""
    key_dim, value_dim = config.count("linear_key_head_dim"), config.count("linear_value_head_dim")
    value_heads = config.count("linear_num_value_heads")
    channels = 2 * config.count("linear_num_key_heads") * key_dim + value_heads * value_dim
    return (
        State("convolution", (channels, config.count("linear_conv_kernel_dim"))),
        State("recurrent", (value_heads, key_dim, value_dim), "float32"),
    )


def _mamba(config: ModelConfig) -> tuple[State, ...]:
    channels = config.count("mamba_expand") * config.count("hidden_size")
    return (
        State("convolution", (channels, config.count("mamba_d_conv"))),
        State("recurrent", (channels, config.count("mamba_d_state")), "float32"),
    )


def _mamba2(config: ModelConfig) -> tuple[State, ...]:
    channels = config.optional("mamba_d_ssm")
    channels = channels or config.count("mamba_expand") * config.count("hidden_size")
    heads, size = config.count("mamba_n_heads"), config.count("mamba_d_state")
    width = config.get("mamba_d_head")
    if width in (None, "auto"):
        width = channels // heads
    mixed = channels + 2 * config.count("mamba_n_groups") * size
    return (
        State("convolution", (mixed, config.count("mamba_d_conv"))),
        State("recurrent", (heads, width, size), "float32"),
    )


def _nemotron(config: ModelConfig) -> tuple[State, ...]:
    heads, width = config.count("mamba_num_heads"), config.count("mamba_head_dim")
    size = config.count("ssm_state_size")
    mixed = heads * width + 2 * config.count("n_groups") * size
    return (
        State("convolution", (mixed, config.count("conv_kernel"))),
        State("recurrent", (heads, width, size), "float32"),
    )


def _lightning(config: ModelConfig) -> tuple[State, ...]:
    """MiniMax: a matrix for each head, in the model's dtype."""
    heads = config.count("num_attention_heads")
    width = config.optional("head_dim") or config.count("hidden_size") // heads
    return (State("recurrent", (heads, width, width)),)


def _short_convolution(config: ModelConfig) -> tuple[State, ...]:
    return (State("convolution", (config.count("hidden_size"), config.count("conv_L_cache"))),)


_STATES: Final[dict[str, Callable[[ModelConfig], tuple[State, ...]]]] = {
    "falcon_h1": _mamba2,
    "granitemoehybrid": _mamba2,
    "jamba": _mamba,
    "lfm2": _short_convolution,
    "minimax": _lightning,
    "nemotron_h": _nemotron,
    "qwen3_5_moe_text": _delta_net,
    "qwen3_5_text": _delta_net,
    "qwen3_next": _delta_net,
}
