"""Bytes as KVQuant's paper counts them (appendix M): to compare papers with, not machines."""

from __future__ import annotations

from kvqtool.memory import LayerGeometry, groups_per_token
from kvqtool.side import EXACT, NORMED, QuantSpec
from kvqtool.spec import KvSpec


def paper_bits(spec: QuantSpec, channels: int, bits: float | None = None) -> float:
    """Return bits per element by KVQuant's own accounting (appendix M): codes, 32 bits an outlier,
    32-bit pointers. `bits` are those of a code where they differ from the spec's.

    Keys: b + 32 f + 32 / C. Values: b + 32 f + 64 / C, the second 32 being a 16-bit scale and
        offset per token.
    Dense schemes have no pointers. It is not what is allocated; compare papers with it, size
    machines with `layer_buffers`.
    """
    if spec.method == EXACT:
        return 16.0
    codes = spec.bits if bits is None else bits
    if spec.token_group:
        return codes + 32 / spec.token_group
    each = 16 if spec.method == NORMED else 32
    total = codes + each * groups_per_token(spec, channels) / channels
    return total + (32 * spec.outlier_fraction + 32 / channels if spec.outlier_fraction else 0.0)


def paper_bytes(spec: KvSpec, layers: tuple[LayerGeometry, ...], batch: int, tokens: int) -> float:
    """Return the bytes of a whole cache by the paper's accounting (`paper_bits`)."""
    bits = spec.adaptive.planned_bits if spec.adaptive else None
    per_token = sum(
        paper_bits(spec.key, layer.key_channels, bits) * layer.key_channels
        + paper_bits(spec.value, layer.value_channels, bits) * layer.value_channels
        for layer in layers
    )
    return per_token * batch * tokens / 8
