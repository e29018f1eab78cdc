"""Stand-ins for what planning has not got: codebooks without calibration, models without weights.

Their bytes are those of the real thing; their text means nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from statistics import NormalDist
from typing import Any

import torch
from torch import Tensor

from kvqtool.bundle import Bundle
from kvqtool.codebook import Codebook, as_half, uniform_levels
from kvqtool.memory import LayerGeometry
from kvqtool.methods import fit_widths
from kvqtool.side import EXACT, WIDTHS, QuantSpec
from kvqtool.spec import SIDES, KvSpec


def synthetic_bundle(
    spec: KvSpec,
    layers: Mapping[int, LayerGeometry],
    spreads: Mapping[int, Tensor] | None = None,
) -> Bundle:
    """Return a bundle for normally distributed states.

    Args:
        spec: the scheme.
        layers: the packed layers' shapes, by index.
        spreads: each layer's standard deviation of every key channel, (key_channels,); None for 1.
    """
    books = {}
    for index, layer in layers.items():
        spread = spreads[index] if spreads else torch.ones(layer.key_channels)
        for side, quant in zip(SIDES, (spec.key, spec.value), strict=True):
            width = layer.key_dim if side == SIDES[0] else layer.value_dim
            book = _codebook(quant, spread.float().cpu())
            books[index, side] = _compensating(book, quant, layer.num_kv_heads, width)
        if spec.adaptive:
            norms = torch.ones(layer.num_kv_heads)
            books[index, SIDES[0]] = replace(books[index, SIDES[0]], query_norm=norms)
    return Bundle(spec, _identity(layers), books, {"calibrated": False})


def _codebook(spec: QuantSpec, spread: Tensor) -> Codebook:
    if spec.fits_levels:
        widths = WIDTHS if spec.is_adaptive else (spec.bits,)
        each = [uniform_levels(bits) if bits else torch.zeros(1) for bits in widths]
        levels = as_half(torch.cat(each))
        if spec.channel_levels:
            levels = levels.expand(len(spread), -1).contiguous()
    else:
        levels = fit_widths(spec, None)[0]
    if not spec.per_channel or spec.method == EXACT:
        return Codebook(levels, levels)
    widest = NormalDist().inv_cdf(1 - spec.outlier_fraction / 2) if spec.outlier_fraction else 4.0
    upper = as_half(spread * widest)
    return Codebook(levels, levels, -upper, upper)


def _compensating(book: Codebook, spec: QuantSpec, heads: int, width: int) -> Codebook:
    """Return a codebook whose channels owe each other nothing, as independent ones do; rounding
    takes all its steps.
    """
    if not spec.compensated:
        return book
    order = torch.arange(width, dtype=torch.int16).expand(heads, width).contiguous()
    return replace(book, feedback=torch.zeros(heads, width, width), order=order)


def _identity(layers: Mapping[int, LayerGeometry]) -> dict[str, Any]:
    return {"name": "synthetic", "num_layers": len(layers)}
