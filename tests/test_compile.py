"""Kernels compile for every architecture, and on Hopper spill no more than is written here."""

from __future__ import annotations

import pytest
import torch
from attention_case import radians
from nvrtc import HAS_NVRTC, compile_source, resources
from shim.build import mostly_slow

from kvqtool.appending import append_kernel
from kvqtool.cuda import Kernel
from kvqtool.matvec import Part, matvec_kernel
from kvqtool.packing_kernels import pack_kernels
from kvqtool.reading import dequantize_kernel
from kvqtool.spec import parse_spec
from kvqtool.variant import Variant, variant_of

pytestmark = pytest.mark.skipif(not HAS_NVRTC, reason="NVRTC is not installed")
SPECS = ("nuq4-1%", "nuq3-1%", "nuq2-1%", "nuq4-1%-pc", "nuq3-1%-pc", "nuq4")
EIGHT = ("nuq8-1%", "nuq3-1%/nuq8-1%")
LLAMA = radians(128, 500_000.0)
VARIANTS = (
    *(variant_of(parse_spec(spec), 128, group, LLAMA) for spec in SPECS for group in (1, 4)),
    *(variant_of(parse_spec("nuq3-1%"), d, 1, radians(d)) for d in (64, 96, 256)),
    variant_of(parse_spec("nuq4-1%/nuq2-1%"), 128, 8, LLAMA, softcap=True),
    variant_of(parse_spec("nuq4-postrope"), 128, 1, bfloat16=True),
    Variant(128, 16, 16, False, False, False, 4),
    *(variant_of(parse_spec(spec), 128, group, LLAMA) for spec in EIGHT for group in (1, 4)),
)
# Bytes spilled at most, by NVRTC 13.0, in the order of VARIANTS. With 16 warps a thread has 128
# registers, with 12 it has 168, and the compiler keeps a few values in memory: it was faster all
# the same than fewer warps.
SPILLS = (16, 0, 0, 0, 0, 0, 0, 8, 0, 0, 12, 4, 0, 0, 0, 0, 12, 0, 16, 4, 32, 0)
ALLOWED = dict(zip(VARIANTS, SPILLS, strict=True))
FEW = (0, 3, 7, 17)
COMP = (("KEY_COMP", 1), ("VALUE_COMP", 1), ("VALUE_FLOAT", 0))
TURNED = (("KEY_COMP", 0), ("VALUE_COMP", 1), ("VALUE_FLOAT", 1))
OTHERS = ("sm_80", "sm_100", "sm_120")


def attend_kernel(variant: Variant) -> Kernel:
    return Kernel("attend", "attend", variant.macros)


@pytest.mark.parametrize("variant", mostly_slow([VARIANTS[i] for i in FEW], VARIANTS), ids=str)
def test_attention_fits_the_registers_of_hopper(variant: Variant) -> None:
    registers, spilled = resources(compile_source(attend_kernel(variant), "sm_90"))
    assert spilled <= ALLOWED[variant]
    assert registers * variant.warps * 32 <= 65536


@pytest.mark.slow
@pytest.mark.parametrize("architecture", OTHERS)
@pytest.mark.parametrize("variant", [VARIANTS[i] for i in (0, 5, 11, 14)], ids=str)
def test_attention_compiles_elsewhere(variant: Variant, architecture: str) -> None:
    compile_source(attend_kernel(variant), architecture)


@pytest.mark.parametrize("architecture", mostly_slow(["sm_90"], ["sm_90", *OTHERS]))
@pytest.mark.parametrize("variant", (VARIANTS[0], VARIANTS[11], VARIANTS[16]), ids=str)
def test_kernels_around_pages_compile(variant: Variant, architecture: str) -> None:
    plain = pack_kernels(variant)
    kernels = [plain["pack_keys"], append_kernel(variant)]  # all of pack.cu
    kernels += [plain[name] for name in ("survey_values", "lay_out", "write_lists")]
    for code in (COMP, TURNED):
        kernels += [pack_kernels(variant, code)["pack_keys"], append_kernel(variant, code)]
        kernels += [pack_kernels(variant, code)["compensate_keys"]]  # all of compensate.cu
    kernels += [pack_kernels(variant)["code_floats"]]  # all of floats.cu
    kernels += [dequantize_kernel(variant, dtype) for dtype in (torch.half, torch.bfloat16)]
    for kernel in kernels:
        registers, spilled = resources(compile_source(kernel, architecture))
        assert spilled == 0 or architecture != "sm_90"
        assert registers <= 128


@pytest.mark.parametrize("part", mostly_slow(["all"], ["all", "codes", "outliers"]))
@pytest.mark.parametrize("variant", [VARIANTS[i] for i in (1, 3, 7)], ids=str)
def test_products_compile_without_spills(variant: Variant, part: Part) -> None:
    kernel = matvec_kernel("score_keys", variant, part)  # all of matvec.cu
    registers, spilled = resources(compile_source(kernel, "sm_90"))
    assert spilled == 0
    assert registers * variant.warps * 32 <= 65536


@pytest.mark.parametrize("source", ["pack", "dequantize"])
def test_pages_of_16_bits_do_not_compile_to_kernels_for_codes(source: str) -> None:
    variant = Variant(128, 16, 16, False, False, False, 1)
    kernels = {
        "pack": pack_kernels(variant)["pack_keys"],
        "dequantize": dequantize_kernel(variant, torch.half),
    }
    with pytest.raises(AssertionError, match="16-bit pages hold states"):
        compile_source(kernels[source], "sm_90")
