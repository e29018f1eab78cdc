"""Models whose layers are split over several processes by attention head (tensor parallelism)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from kvqtool.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@contextmanager
def explain_split(model: PreTrainedModel) -> Iterator[None]:
    """Say why a model's first forward fails, where it is because a KV head was cut in two.

    Families that keep all heads on every process are not concerned, so the model itself is asked.

    Args:
        model: loaded with a tensor-parallel plan, or without.

    Raises:
        InputError: when it fails and the processes do not divide the KV heads.
    """
    try:
        yield
    except RuntimeError as error:
        config: Any = model.config.get_text_config(decoder=True)
        processes = getattr(model, "tp_size", None) or 1
        num_kv_heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        if num_kv_heads % processes == 0:
            raise
        raise InputError(
            f"{processes} processes cannot split {num_kv_heads} KV heads; "
            "start a number that divides them, or load without a tensor-parallel plan"
        ) from error
