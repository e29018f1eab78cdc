"""GPUs by name: the memory their driver reports, their bandwidth, and where both are written.

Memory is what `nvidia-smi` shows as total, in MiB, or what AMD's table gives in GiB; it is not the
round number of the box, which is sometimes GB and sometimes GiB. On a Mac, Metal lets the GPU use
three quarters of the memory by default.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from kvqtool.errors import InputError

_MIB: Final = 1 << 20
_GIB: Final = 1 << 30
_NVIDIA: Final = "https://www.nvidia.com/en-us/"
_DATA_CENTER: Final = f"{_NVIDIA}data-center/"
_GEFORCE: Final = f"{_NVIDIA}geforce/graphics-cards/"
_AMD: Final = "https://www.amd.com/en/products/accelerators/instinct/"
_APPLE: Final = "https://support.apple.com/en-us/specs"


@dataclass(frozen=True)
class Gpu:
    """A device.

    Args:
        name: as users write it.
        memory_bytes: what programs can allocate, context included.
        bandwidth: bytes a second, from the vendor.
        source: the vendor's page for the bandwidth.
        is_card: whether it is a card of its own; a Mac shares its memory.
    """

    name: str
    memory_bytes: int
    bandwidth: float
    source: str
    is_card: bool = True


def _nvidia(name: str, mib: int, gigabytes_per_second: float, source: str) -> Gpu:
    return Gpu(name, mib * _MIB, gigabytes_per_second * 1e9, source)


def _amd(name: str, gib: int, gigabytes_per_second: float, source: str) -> Gpu:
    return Gpu(name, gib * _GIB, gigabytes_per_second * 1e9, source)


def _apple(chip: str, gib: int, gigabytes_per_second: float) -> Gpu:
    usable = gib * _GIB * 3 // 4
    return Gpu(f"{chip}-{gib}", usable, gigabytes_per_second * 1e9, _APPLE, is_card=False)


GPUS: Final[tuple[Gpu, ...]] = (
    _nvidia("t4", 15360, 320, f"{_DATA_CENTER}tesla-t4/"),
    _nvidia("v100-16", 16384, 900, f"{_DATA_CENTER}v100/"),
    _nvidia("v100-32", 32768, 900, f"{_DATA_CENTER}v100/"),
    _nvidia("rtx-3060", 12288, 360, f"{_GEFORCE}30-series/rtx-3060-3060ti/"),
    _nvidia("rtx-3090", 24576, 936, f"{_GEFORCE}30-series/rtx-3090-3090ti/"),
    _nvidia("rtx-4090", 24564, 1008, f"{_GEFORCE}40-series/rtx-4090/"),
    _nvidia("rtx-5090", 32607, 1792, f"{_GEFORCE}50-series/rtx-5090/"),
    _nvidia("rtx-a6000", 49140, 768, f"{_NVIDIA}products/workstations/rtx-a6000/"),
    _nvidia("rtx-6000-ada", 49140, 960, f"{_NVIDIA}products/workstations/rtx-6000/"),
    _nvidia(
        "rtx-pro-6000",
        97887,
        1792,
        f"{_NVIDIA}products/workstations/professional-desktop-gpus/rtx-pro-6000/",
    ),
    _nvidia("a10", 23028, 600, f"{_DATA_CENTER}products/a10-gpu/"),
    _nvidia("l4", 23034, 300, f"{_DATA_CENTER}l4/"),
    _nvidia("l40s", 46068, 864, f"{_DATA_CENTER}l40s/"),
    _nvidia("a100-40", 40960, 1555, f"{_DATA_CENTER}a100/"),
    _nvidia("a100-80", 81920, 2039, f"{_DATA_CENTER}a100/"),
    _nvidia("h100-pcie", 81559, 2000, f"{_DATA_CENTER}h100/"),
    _nvidia("h100", 81559, 3350, f"{_DATA_CENTER}h100/"),
    _nvidia("h100-nvl", 95830, 3900, f"{_DATA_CENTER}h100/"),
    _nvidia("h200", 143771, 4800, f"{_DATA_CENTER}h200/"),
    _nvidia("gh200", 97871, 4000, f"{_DATA_CENTER}grace-hopper-superchip/"),
    # 7680 bits at 3996 MHz as the driver reports them; the box says 8000.
    _nvidia("b200", 183359, 7672, "https://github.com/pytorch/ao/pull/4002"),
    _nvidia("b300", 275040, 8000, f"{_DATA_CENTER}hgx/"),
    _amd("mi300x", 192, 5300, f"{_AMD}mi300/mi300x.html"),
    _amd("mi325x", 256, 6000, f"{_AMD}mi300/mi325x.html"),
    _amd("mi350x", 288, 8000, f"{_AMD}mi350/mi350x.html"),
    _amd("mi355x", 288, 8000, f"{_AMD}mi350/mi355x.html"),
    _apple("m2-ultra", 192, 800),
    _apple("m3-max", 128, 400),
    _apple("m3-ultra", 512, 819),
    _apple("m4", 32, 120),
    _apple("m4-pro", 64, 273),
    _apple("m4-max", 128, 546),
)


def find_gpu(name: str) -> Gpu:
    """Return a GPU by its name, however it is spaced and capitalised.

    Raises:
        InputError: when there is no such GPU in the catalog.
    """
    wanted = _key(name)
    for gpu in GPUS:
        if _key(gpu.name) == wanted:
            return gpu
    known = ", ".join(gpu.name for gpu in GPUS)
    raise InputError(f"GPU {name!r} is not in the catalog; use --gpu-memory, or one of: {known}")


def _key(name: str) -> str:
    return "".join(letter for letter in name.lower() if letter.isalnum())
