"""Every kernel compiles for every architecture; on Hopper no loop spills."""

from __future__ import annotations

from itertools import product

import pytest
from nvrtc import HAS_NVRTC, compile_source, resources
from shim.build import mostly_slow

from kvqtool.cuda import Kernel
from kvqtool.fused import Variant
from kvqtool.packing import pack_kernels

pytestmark = pytest.mark.skipif(not HAS_NVRTC, reason="NVRTC is not installed")
VARIANTS = (
    *(
        Variant(128, b, b, pc, True, True, g)
        for b, pc, g in product((2, 3, 4), (False, True), (1, 4))
    ),
    *(Variant(d, 3, 3, False, True, True, 1) for d in (64, 96, 256)),
    Variant(128, 4, 2, False, True, True, 8, softcap=True),
    Variant(128, 4, 4, False, False, False, 1, bfloat16=True),
    Variant(128, 16, 16, False, False, False, 4),
)  # fmt: skip
# With 16 warps some of a segment's bookkeeping goes to memory, nothing inside the loop over slabs.
COLD_SPILLS = 160
FEW = (0, 3, 9)
OTHERS = ("sm_80", "sm_100", "sm_120")


def attend_kernel(variant: Variant) -> Kernel:
    return Kernel("attend", "attend", variant.macros)


@pytest.mark.parametrize("variant", mostly_slow([VARIANTS[i] for i in FEW], VARIANTS), ids=str)
def test_attention_fits_the_registers_of_hopper(variant: Variant) -> None:
    registers, spilled = resources(compile_source(attend_kernel(variant), "sm_90"))
    assert spilled <= COLD_SPILLS
    assert registers * variant.warps * 32 <= 65536


@pytest.mark.slow
@pytest.mark.parametrize("architecture", OTHERS)
@pytest.mark.parametrize("variant", [VARIANTS[i] for i in (0, 5, 11, 14)], ids=str)
def test_attention_compiles_elsewhere(variant: Variant, architecture: str) -> None:
    compile_source(attend_kernel(variant), architecture)


@pytest.mark.parametrize("architecture", mostly_slow(["sm_90"], ["sm_90", *OTHERS]))
def test_packing_compiles(architecture: str) -> None:
    for variant in (VARIANTS[0], VARIANTS[11], VARIANTS[-2]):
        registers, spilled = resources(
            compile_source(pack_kernels(variant)["pack_slabs"], architecture)
        )
        assert spilled == 0
        assert registers <= 128
