"""The parts of a model that a cache does not show: widths, experts, vocabulary."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from kvqtool.config import ModelConfig

_UNGATED: Final = (
    *("bloom", "falcon", "gpt2", "gpt_neox", "gptj", "nemotron_h", "opt", "phi", "starcoder2"),
    "nanochat",
)
# transformers gives these no sdpa (capped scores, sinks in the softmax, own code): bytes of a score
# at the highest point, traced in bfloat16.
_SCORE_BYTES: Final = {"bloom": 15, "gemma2": 11, "gpt_oss": 7, "gptj": 11}


@dataclass(frozen=True)
class Trunk:
    """Widths of a decoder.

    Args:
        hidden: numbers of a token between layers.
        num_heads: query heads.
        query_dim: width of a query head.
        value_dim: width of a head's output.
        intermediate: width of the feed-forward part that a token passes, all its experts together.
        vocabulary: tokens there are.
        is_gated: whether the feed-forward part multiplies two projections.
        score_bytes: what eager attention takes for a score; 0 where scores are never written out.
    """

    hidden: int
    num_heads: int
    query_dim: int
    value_dim: int
    intermediate: int
    vocabulary: int
    is_gated: bool
    score_bytes: int = 0


def read_trunk(config: ModelConfig) -> Trunk:
    """Return a model's widths.

    Raises:
        InputError: when the config lacks one.
    """
    hidden, heads = config.count("hidden_size"), config.count("num_attention_heads")
    query = value = config.optional("head_dim") or hidden // heads
    if config.get("kv_lora_rank"):
        query = config.count("qk_nope_head_dim") + config.count("qk_rope_head_dim")
        value = config.count("v_head_dim")
    return Trunk(
        hidden=hidden,
        num_heads=heads,
        query_dim=query,
        value_dim=value,
        intermediate=_active_width(config),
        vocabulary=config.count("vocab_size"),
        is_gated=config.model_type not in _UNGATED,
        score_bytes=_SCORE_BYTES.get(config.model_type, 0),
    )


def _active_width(config: ModelConfig) -> int:
    """Return the widest feed-forward part a token passes: dense, or its experts together."""
    dense = dense_width(config)
    experts = config.at_least_zero("num_experts_per_tok")
    if not experts or not config.get("num_experts"):
        return dense
    each = config.optional("moe_intermediate_size")
    shared = shared_width(config, each or dense)
    return max(experts * (each or dense) + shared, dense if each else 0)


def dense_width(config: ModelConfig) -> int:
    """Return the width of a layer's dense feed-forward part, the widest where layers differ."""
    stated = config.get("intermediate_size")
    if isinstance(stated, list) and stated and all(type(width) is int for width in stated):
        widest: int = max(stated)
        return widest
    return config.optional("intermediate_size") or 4 * config.count("hidden_size")


def shared_width(config: ModelConfig, each: int) -> int:
    """Return the width of the experts that every token passes, together."""
    stated = config.at_least_zero("shared_expert_intermediate_size")
    return stated or config.at_least_zero("n_shared_experts") * each
