"""Watch the size of queries while a model runs: what QAQ's tolerance of keys is measured by.

Queries pass through attention functions only, so the model runs on one of ours for the while.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Final

from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import sdpa_mask

from kvqtool.attention import band_attention
from kvqtool.errors import InputError
from kvqtool.seam import Seam

if TYPE_CHECKING:
    from transformers import PreTrainedModel

QUERIES: Final = "kvqtool_queries"
_ATTRIBUTE: Final = "_kvqtool_query_watch"


@contextmanager
def watch_queries(
    model: PreTrainedModel, seam: Seam, take: Callable[[int, Tensor], None]
) -> Iterator[None]:
    """Tell `take` of every call of a packed layer's attention inside the block.

    Args:
        model: the model; its attention is put back afterwards.
        seam: what `attach.probe` found.
        take: given the layer's index and |Q|^2 with the softmax scale in Q, (batch, num_heads,
            queries) float32.

    Raises:
        InputError: when the model keeps its own attention.
    """
    AttentionInterface.register(QUERIES, watched_attention)
    AttentionMaskInterface.register(QUERIES, sdpa_mask)
    before = model.config._attn_implementation
    watched = [layer for layer in seam.packed if layer.module is not None]
    model.set_attn_implementation(QUERIES)
    try:
        if model.config._attn_implementation != QUERIES:
            raise InputError(
                f"{type(model).__name__} does not let its attention be replaced, and qaq needs its "
                "queries; use a spec with fixed bits, like nuq3-1%"
            )
        for layer in watched:
            setattr(layer.module, _ATTRIBUTE, _taker(layer.index, take))
        yield
    finally:
        model.set_attn_implementation(before)
        for layer in watched:
            layer.module.__dict__.pop(_ATTRIBUTE, None)


def watched_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    **options: Any,
) -> tuple[Tensor, None]:
    """Attend as `band_attention` does and tell the module's watch of the queries; arguments are
    transformers' own.
    """
    take: Callable[[Tensor], None] | None = getattr(module, _ATTRIBUTE, None)
    if take is not None:
        scaling = options.get("scaling") or query.shape[-1] ** -0.5
        take((query.detach().float() * scaling).square().sum(-1))
    return band_attention(module, query, key, value, mask, **options)


def _taker(index: int, take: Callable[[int, Tensor], None]) -> Callable[[Tensor], None]:
    return lambda norms: take(index, norms)
