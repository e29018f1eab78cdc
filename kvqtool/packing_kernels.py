"""The kernels that pack a prompt: which there are, and in what shape each is launched."""

from __future__ import annotations

from functools import cache
from typing import Final

from torch import Tensor

from kvqtool.code_tables import PLAIN
from kvqtool.cuda import Kernel, Macros
from kvqtool.memory import SLAB_TOKENS
from kvqtool.variant import Variant

_WARPS: Final = 4  # of a block of `survey_values`
_STRETCH: Final = 4  # heads of a block of `pack_keys`, slabs of one of `pack_values`
_ITEMS: Final = 1024  # outliers that a block of `write_lists` gathers at a time
_WRITERS: Final = {"pack_keys": "pack", "pack_values": "pack", "write_lists": "lists"}
# What kernels are not specialised for that know no codes: one compilation does for all schemes.
_ANY_CODES: Final[Macros] = (
    *(("KEY_BITS", 4), ("VALUE_BITS", 4), ("CHANNEL_LEVELS", 0), ("ROTATED", 0), ("OUTLIERS", 1)),
)
_FLOATS: Final = ("survey_floats", "code_floats")
_ROUNDINGS: Final = ("compensate_keys", "compensate_values")


def launch_shape(
    name: str, states: tuple[Tensor, Tensor], variant: Variant
) -> tuple[int, int, int]:
    """Return a launch's blocks, threads and bytes of shared memory: a warp a token of all heads;
    one block for all lists; a block a slab, with room for counts, middles and marks or for what
    compensated rounding works on; or a block some slabs, with room for two, what their tokens or
    channels have, and cells.
    """
    batch, heads, tokens, head_dim = states[0].shape
    each = SLAB_TOKENS * 8 * states[1].element_size()  # a token's range and cuts
    slabs, threads = batch * heads * -(-tokens // SLAB_TOKENS), 32 * variant.steps
    if name == "lay_out":
        return 1, 1024, 128
    if name == "survey_values":
        shared = _WARPS * (2 * heads * head_dim + 4 * (2 * 128 + 8))
        return -(-batch * tokens // _WARPS), 32 * _WARPS, shared
    if name == "survey_floats":
        return -(-batch * tokens // _WARPS), 32 * _WARPS, 4 * _WARPS * heads * head_dim
    if name == "code_floats":
        return slabs, SLAB_TOKENS, each
    if name.startswith("compensate"):
        shared = 4 * 65 * head_dim + SLAB_TOKENS * (head_dim + 4) + 4 * head_dim + each
        return slabs, SLAB_TOKENS, shared
    if name == "write_lists":
        shared = 4 * (head_dim + variant.steps + 4 + variant.middles) + 2 * _ITEMS
        return slabs, threads // 2, shared
    staged = 2 * SLAB_TOKENS * (head_dim + 8) * 2
    if name == "pack_keys":
        blocks = batch * -(-tokens // SLAB_TOKENS) * -(-heads // _STRETCH)
        beside, bits = 16 * _STRETCH * head_dim, variant.key_bits  # limits of channels
    else:
        blocks = batch * heads * -(-tokens // (SLAB_TOKENS * _STRETCH))
        beside, bits = 8 * 2 * SLAB_TOKENS, variant.value_bits  # affine of tokens
    return blocks, threads, staged + beside + 4 * max(16, 1 << bits) + 256 + 16 + 64


@cache
def pack_kernels(variant: Variant, code: Macros = PLAIN) -> dict[str, Kernel]:
    """Return the functions that pack a prompt for a variant and `CodeTables.macros`, of
    kernels/survey.cu, floats.cu, compensate.cu, pack.cu, layout.cu and lists.cu.
    """
    macros = (*variant.code_macros, ("BF16", int(variant.bfloat16)))
    macros = (*macros, ("WARPS", _WARPS), ("STRETCH", _STRETCH))
    is_key, is_value, is_float = (value for _, value in code)
    ahead = (("KEY_COMP", is_key), ("VALUE_COMP", is_value | is_float))
    states = tuple((k, v) for k, v in macros if k in ("HEAD_DIM", "BF16", "WARPS"))
    plain = {"survey_values": Kernel("survey", "survey_values", (*states, *_ANY_CODES))}
    plain["lay_out"] = Kernel("layout", "lay_out", (("HEAD_DIM", 128), ("BF16", 0), *_ANY_CODES))
    rounding = {n: Kernel("compensate", n, (*macros, code[2])) for n in _ROUNDINGS}
    floats = {name: Kernel("floats", name, macros) for name in _FLOATS}
    writers = {n: Kernel(file, n, (*macros, *ahead)) for n, file in _WRITERS.items()}
    return plain | rounding | floats | writers
