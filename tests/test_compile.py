"""Kernels compile for every architecture, and on Hopper spill no more than is written here."""

from __future__ import annotations

from dataclasses import replace
from itertools import product

import pytest
import torch
from nvrtc import HAS_NVRTC, compile_source, resources
from shim.build import mostly_slow

from kvqtool.appending import append_kernel
from kvqtool.cuda import Kernel
from kvqtool.packing import pack_kernels
from kvqtool.reading import dequantize_kernel
from kvqtool.variant import Variant

pytestmark = pytest.mark.skipif(not HAS_NVRTC, reason="NVRTC is not installed")
NUQ2, NUQ3, NUQ4 = (Variant(128, b, b, False, True, True, 1) for b in (2, 3, 4))
VARIANTS = (
    *(
        Variant(128, b, b, pc, True, True, g)
        for b, pc, g in product((2, 3, 4), (False, True), (1, 4))
    ),
    *(Variant(d, 3, 3, False, True, True, 1) for d in (64, 96, 256)),
    Variant(128, 4, 2, False, True, True, 8, softcap=True),
    Variant(128, 4, 4, False, False, False, 1, bfloat16=True),
    Variant(128, 16, 16, False, False, False, 4),
    replace(NUQ2, lut_values=True),
    replace(NUQ2, unrolled=True),
    replace(NUQ2, most_warps=12),
    replace(NUQ3, lut_keys=True, lut_values=True),
    replace(NUQ3, unrolled=True),
    replace(NUQ3, most_warps=12),
    replace(NUQ4, unrolled=True),
    replace(NUQ4, most_warps=12),
)  # fmt: skip
# Bytes spilled at most, by NVRTC 13.0, in the order of VARIANTS. With more than 12 warps a thread
# has 128 registers, and the compiler keeps some values in memory; nothing here says where, and what
# that costs was not measured. With 12 warps or fewer (168 registers) nothing is spilled.
SPILLS = (
    *(12, 144, 36, 80, 0, 40, 12, 48, 36, 60, 72, 0),
    *(0, 0, 0, 0, 12, 0),
    *(144, 36, 0, 12, 0, 0, 48, 0),
)
ALLOWED = dict(zip(VARIANTS, SPILLS, strict=True))
FEW = (0, 3, 9, 18)
OTHERS = ("sm_80", "sm_100", "sm_120")


def attend_kernel(variant: Variant) -> Kernel:
    return Kernel("attend", "attend", variant.macros)


@pytest.mark.parametrize("variant", mostly_slow([VARIANTS[i] for i in FEW], VARIANTS), ids=str)
def test_attention_fits_the_registers_of_hopper(variant: Variant) -> None:
    registers, spilled = resources(compile_source(attend_kernel(variant), "sm_90"))
    assert spilled <= ALLOWED[variant]
    assert registers * variant.warps * 32 <= 65536


def test_twelve_warps_spill_nothing() -> None:
    assert all(not spilled for variant, spilled in ALLOWED.items() if variant.warps <= 12)


@pytest.mark.slow
@pytest.mark.parametrize("architecture", OTHERS)
@pytest.mark.parametrize("variant", [VARIANTS[i] for i in (0, 5, 11, 14)], ids=str)
def test_attention_compiles_elsewhere(variant: Variant, architecture: str) -> None:
    compile_source(attend_kernel(variant), architecture)


@pytest.mark.parametrize("architecture", mostly_slow(["sm_90"], ["sm_90", *OTHERS]))
@pytest.mark.parametrize("variant", (VARIANTS[0], VARIANTS[11], VARIANTS[16]), ids=str)
def test_kernels_around_pages_compile_without_spills(variant: Variant, architecture: str) -> None:
    kernels = [pack_kernels(variant)["pack_slabs"], append_kernel(variant)]  # all of pack.cu
    kernels += [dequantize_kernel(variant, dtype) for dtype in (torch.half, torch.bfloat16)]
    for kernel in kernels:
        registers, spilled = resources(compile_source(kernel, architecture))
        assert spilled == 0
        assert registers <= 128


@pytest.mark.parametrize("source", ["pack", "dequantize"])
def test_pages_of_16_bits_do_not_compile_to_kernels_for_codes(source: str) -> None:
    variant = Variant(128, 16, 16, False, False, False, 1)
    kernels = {
        "pack": pack_kernels(variant)["pack_slabs"],
        "dequantize": dequantize_kernel(variant, torch.half),
    }
    with pytest.raises(AssertionError, match="16-bit pages hold states"):
        compile_source(kernels[source], "sm_90")
