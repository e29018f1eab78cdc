"""Check what kernels are handed: they see pointers and read whatever lies there.

What tensors hold (lengths, page numbers) lies on the device and is not looked at.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from kvqtool.errors import InputError
from kvqtool.memory import PAGE_TOKENS
from kvqtool.page_memory import QUAD, SLABS
from kvqtool.pages import Pages
from kvqtool.variant import Variant

# A name, a tensor, its dtype and its shape; a length of None may be anything.
Expected = tuple[str, Tensor, torch.dtype, tuple[int | None, ...]]


def check_tensors(*groups: Iterable[Expected]) -> None:
    """Check the tensors of a launch.

    Raises:
        InputError: unless each is contiguous, of its dtype and shape, and beside the first one.
    """
    all_expected = [expected for group in groups for expected in group]
    device = all_expected[0][1].device
    for name, tensor, dtype, shape in all_expected:
        fits = tensor.shape == shape or (
            len(shape) == tensor.dim()
            and all(w in (None, n) for w, n in zip(shape, tensor.shape, strict=True))
        )
        if fits and tensor.dtype == dtype and tensor.device == device and tensor.is_contiguous():
            continue
        lengths = ", ".join("any" if length is None else str(length) for length in shape)
        stride = "" if tensor.is_contiguous() else "non-contiguous "
        raise InputError(
            f"{name}: expected a contiguous {dtype} tensor ({lengths}) on {device}, "
            f"received a {stride}{tensor.dtype} {tuple(tensor.shape)} on {tensor.device}"
        )


def check_room(name: str, tensor: Tensor, count: int) -> None:
    """Raise InputError unless a tensor has room for `count` elements."""
    if tensor.numel() < count:
        raise InputError(f"{name}: expected room for {count}, received {tensor.numel()}")


def check_codes(variant: Variant) -> None:
    """Raise InputError unless pages hold codes on both sides, which is all but attention know."""
    if max(variant.key_bits, variant.value_bits) > 8:
        raise InputError(
            f"expected codes of 2, 3, 4 or 8 bits, received {variant.key_bits}-bit keys and "
            f"{variant.value_bits}-bit values; pages of 16 bits hold the states as they are"
        )


def expect_pages(pages: Pages, variant: Variant, heads: int, batch: int) -> list[Expected]:
    """Return what kernels expect of pages; there are as many as `ranges` says."""
    count = len(pages.ranges)
    return [
        ("slabs", pages.slabs, torch.int32, (count, heads, SLABS, variant.slab_words)),
        ("ranges", pages.ranges, torch.float16, (count, PAGE_TOKENS, 2)),
        ("outlier_index", pages.outlier_index, torch.int32, (count, heads, SLABS, QUAD)),
        ("outlier_words", pages.outlier_words, torch.int32, (None,)),
        ("page_table", pages.page_table, torch.int32, (batch, None)),
    ]
