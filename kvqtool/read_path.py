"""How a layer is read: which layers the kernels can attend to straight from pages, and why not the
others.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from kvqtool.cuda import unavailable
from kvqtool.errors import InputError, RunError
from kvqtool.hadamard import rotate_heads
from kvqtool.kernel_scratch import unreadable_side
from kvqtool.rows import Pair
from kvqtool.seam import LayerSeam
from kvqtool.spec import KvSpec
from kvqtool.variant import Variant, groups_of, variant_of

READ_PATHS: Final = ("auto", "fused", "materialise")
_DTYPES: Final = (torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Place:
    """Where a layer runs.

    Args:
        device: of its states.
        dtype: of its states.
        num_heads: query heads.
    """

    device: torch.device
    dtype: torch.dtype
    num_heads: int


@dataclass(frozen=True)
class PageForm:
    """How a layer's keys lie in pages.

    Args:
        order: (head_dim,) int64, the channel at each place; partners of a rotation head_dim / 2
            apart.
        inv_freq: (head_dim / 2,) float64 radians a token by place; None where pages hold keys as
            attention sees them.
        scaling: what the model's rotation scales keys by beside turning them.
    """

    order: Tensor
    inv_freq: Tensor | None
    scaling: float

    def as_stored(self, states: Pair, *, has_turned_values: bool) -> Pair:
        """Return states as a model computed them, (B, H, T, D) each, in the form in which pages
        decode: keys unscaled, values rotated where these are; contiguous.
        """
        key, value = states
        if self.scaling != 1:
            key = (key.float() / self.scaling).to(key.dtype)
        if has_turned_values and value.numel():
            value = rotate_heads(value.float()).to(value.dtype)
        return key.contiguous(), value.contiguous()


class ReadPath:
    """How one layer is read, why, and how often it was: what reports say of it.

    A layer that shall be read from pages is so from its second call on, once its attention was seen
    to pass on the very tensors the cache returned.
    """

    def __init__(self, layer: int, wanted: str, reason: str | None) -> None:
        """Choose.

        Args:
            layer: the cache layer's index.
            wanted: `auto`, `fused` or `materialise`.
            reason: why kernels cannot read the layer, or None where they can.

        Raises:
            InputError: when `fused` was wanted and cannot be.
        """
        if wanted == "fused" and reason:
            raise InputError(
                f"layer {layer} cannot be read by the fused kernel: {reason}; "
                "use --read-path auto or materialise"
            )
        self.layer = layer
        self.wanted = wanted
        self.reason = reason or ("asked for" if wanted == "materialise" else None)
        self.calls = dict.fromkeys(("exact", "fused", "dequantize", "materialise"), 0)
        self.is_offered = self.is_witnessed = False

    @property
    def is_fused(self) -> bool:
        """Whether the layer is read from pages."""
        return self.reason is None

    def refuse(self, reason: str) -> None:
        """Read through torch from now on.

        Raises:
            RunError: when `fused` was asked for.
        """
        if self.wanted == "fused":
            raise RunError(
                f"layer {self.layer} cannot be read by the fused kernel: {reason}; "
                "use --read-path auto or materialise"
            )
        self.reason = self.reason or reason

    def witness(self, unknown: str | None) -> None:
        """Take note that attention was handed the cache's own tensors, and of what it asks for that
        kernels do not know.
        """
        if unknown:
            self.refuse(f"attention with {unknown}")
        self.is_witnessed = True

    def count(self, way: str) -> None:
        """Count a call that read the layer one way."""
        self.calls[way] += 1


def unreadable(layer: LayerSeam, spec: KvSpec, place: Place) -> str | None:
    """Return why kernels cannot read a layer from pages, or None where they can."""
    geometry = layer.geometry
    if spec.adaptive:
        return "bits by token"
    if geometry.key_dim != geometry.value_dim:
        return f"keys of {geometry.key_dim} channels and values of {geometry.value_dim}"
    reason = unreadable_side(spec.key, is_key=True) or unreadable_side(spec.value, is_key=False)
    if reason:
        return reason
    if layer.rotation is not None and spec.key.pre_rope:
        if layer.formula is None:
            return "angles are not a function of position"
        if layer.formula.scaling != 1 and layer.rotation.width != geometry.key_dim:
            return "a rotation that scales part of a head"
    if place.device.type == "cuda" and place.dtype not in _DTYPES:
        return f"{str(place.dtype).removeprefix('torch.')} states; use float16 or bfloat16"
    try:
        variant = layer_variant(layer, spec, place)
    except InputError as error:
        return str(error)
    if place.device.type == "cuda":
        return unavailable(place.device, variant.shared_bytes)
    return None


def layer_variant(
    layer: LayerSeam, spec: KvSpec, place: Place, *, softcap: bool = False
) -> Variant:
    """Return the kernel for a layer.

    Raises:
        InputError: when there is none.
    """
    group = groups_of(place.num_heads, layer.geometry.num_kv_heads)
    is_bfloat16 = place.dtype == torch.bfloat16
    inv_freq = page_form(layer, spec).inv_freq
    head_dim = layer.geometry.key_dim
    return variant_of(spec, head_dim, group, inv_freq, softcap=softcap, bfloat16=is_bfloat16)


def page_form(layer: LayerSeam, spec: KvSpec) -> PageForm:
    """Return how a readable layer's keys lie in pages."""
    head_dim, rotation = layer.geometry.key_dim, layer.rotation
    if rotation is None or not spec.key.pre_rope:
        return PageForm(torch.arange(head_dim), None, 1.0)
    assert layer.formula is not None
    turned = torch.arange(rotation.offset, rotation.offset + rotation.width)
    pairs = turned.view(2, -1) if rotation.layout == "half" else turned.view(-1, 2).T
    fixed = [c for c in range(head_dim) if not 0 <= c - rotation.offset < rotation.width]
    order = torch.cat([pairs, torch.tensor(fixed, dtype=torch.int64).view(2, -1)], dim=1).flatten()
    inv_freq = layer.formula.inv_freq.cpu().double() * rotation.sign
    padded = torch.nn.functional.pad(inv_freq, (0, head_dim // 2 - len(inv_freq)))
    return PageForm(order, padded, layer.formula.scaling)
