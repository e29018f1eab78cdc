"""Kernels are not handed what they would misread: every launch is refused with what was wrong."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from attention_case import Case, build
from packing_case import PackCase, build_pack

from kvqtool.appending import append, new_pages
from kvqtool.cuda import Argument, Kernel
from kvqtool.errors import InputError
from kvqtool.fused import attend, new_workspace
from kvqtool.packing import pack
from kvqtool.reading import dequantize
from kvqtool.variant import Variant, variant_of

CASE = PackCase("nuq3-1%", tokens=3)


def never(kernel: Kernel, shape: tuple[int, int, int], arguments: Sequence[Argument]) -> None:
    raise AssertionError("a kernel was launched")


def surveys(kernel: Kernel, shape: tuple[int, int, int], arguments: Sequence[Argument]) -> None:
    """Launch nothing but what reads states alone, which are checked first."""
    assert kernel.function == "survey_values"


def packed(**changed: Any) -> None:
    """Pack a small case with some arguments changed."""
    built = build_pack(CASE)
    given = {"states": built.states, "turns": built.turns, "code": built.code}
    given |= {"tables": built.tables, "variant": built.variant, "run": never}
    pack(**{**given, **changed})


def test_packing_refuses_states_it_would_misread() -> None:
    key, value = build_pack(CASE).states
    with pytest.raises(InputError, match=r"keys: expected a contiguous torch.float16 .*bfloat16"):
        packed(states=(key.bfloat16(), value))
    with pytest.raises(InputError, match=r"values: .*received a non-contiguous"):
        packed(states=(key, value.transpose(-1, -2).contiguous().transpose(-1, -2)))
    with pytest.raises(InputError, match=r"values: .*on cpu, received .* on meta"):
        packed(states=(key, value.to("meta")))
    with pytest.raises(InputError, match=r"turns: expected .*\(1, 3, 64, 2\)"):
        packed(turns=torch.zeros(1, 2, 64, 2))


def test_packing_refuses_tables_of_another_layer() -> None:
    built = build_pack(CASE)
    with pytest.raises(InputError, match=r"lower: expected .*\(256\)"):
        packed(code=replace(built.code, lower=built.code.lower[:128]), run=surveys)
    with pytest.raises(InputError, match=r"key_table: expected"):
        packed(tables=replace(built.tables, key_table=built.tables.key_table[:1]), run=surveys)


def test_packing_refuses_to_lose_outliers() -> None:
    variant = replace(build_pack(CASE).variant, outliers=False)
    with pytest.raises(InputError, match=r"2 values at either end of a token .* would be lost"):
        packed(variant=variant)


def test_pages_of_16_bits_hold_no_codes() -> None:
    variant = replace(build_pack(CASE).variant, key_bits=16, value_bits=16)
    with pytest.raises(InputError, match="received 16-bit keys and 16-bit values"):
        packed(variant=variant)
    built = build(Case("nuq4-1%", (20,)))
    with pytest.raises(InputError, match="received 16-bit keys"):
        dequantize(
            built.context, built.tables, replace(built.variant, key_bits=16), torch.half, never
        )


def test_dequantizing_refuses_another_dtype_or_width() -> None:
    built = build(Case("nuq4-1%", (20,)))
    with pytest.raises(InputError, match=r"expected float16 or bfloat16, received torch.float32"):
        dequantize(built.context, built.tables, built.variant, torch.float32, never)
    narrow = replace(built.variant, value_bits=2)
    with pytest.raises(InputError, match="slabs: expected"):
        dequantize(built.context, built.tables, narrow, torch.half, never)
    state = replace(built.context, state=built.context.state.long())
    with pytest.raises(InputError, match=r"state: expected .*torch.int32"):
        dequantize(state, built.tables, built.variant, torch.half, never)


def test_appending_refuses_pages_without_the_room_they_claim() -> None:
    built = build_pack(CASE)
    key, value = (part[:, :, 0].contiguous() for part in built.states)
    turns, state = built.turns[:, 0].contiguous(), torch.zeros(1, 8, dtype=torch.int32)
    growing = new_pages(built.variant, 1, 2, 1, (8, 8), key.device)
    rest = built.code, built.tables, built.variant, never
    with pytest.raises(InputError, match=r"outlier_words: expected room for 4096, received 64"):
        append((key, value, turns, state), replace(growing, room=(512, 512)), *rest)
    with pytest.raises(InputError, match="state: expected"):
        append((key, value, turns, state[:, :4]), growing, *rest)
    with pytest.raises(InputError, match="counts: expected"):
        append((key, value, turns, state), replace(growing, counts=growing.counts[:, :1]), *rest)


def test_attention_refuses_a_query_or_a_workspace_of_another_shape() -> None:
    built = build(Case("nuq4-1%", (20,), group=2))
    workspace = new_workspace(built.variant, built.query, 2, blocks=1)
    inputs = built.context, built.tables, built.variant
    with pytest.raises(InputError, match=r"query: expected a contiguous torch.float16"):
        attend(built.query.float(), *inputs, workspace, never)
    with pytest.raises(InputError, match=r"page_table: expected .*\(2, any\)"):
        attend(built.query.repeat(2, 1, 1), *inputs, workspace, never)
    with pytest.raises(InputError, match="heads in multiples of 2"):
        attend(built.query[:, :3].contiguous(), *inputs, workspace, never)
    with pytest.raises(InputError, match="partials: expected room"):
        attend(built.query, *inputs, replace(workspace, blocks=9), never)
    short = torch.empty(1, 3)
    with pytest.raises(InputError, match=r"log_sums: expected .*\(1, 4\)"):
        attend(built.query, *inputs, replace(workspace, log_sums=short), never)
    capped = replace(built.tables, softcap=20.0)
    with pytest.raises(InputError, match="no softcap"):
        attend(built.query, built.context, capped, built.variant, workspace, never)


def test_a_variant_without_room_for_a_warp_is_refused() -> None:
    with pytest.raises(InputError, match=r"4-bit keys .* of 256 channels leave no shared memory"):
        Variant(256, 4, 4, True, True, True, 1)
    with pytest.raises(InputError, match="1, 2, 4 or 8 query heads"):
        Variant(128, 4, 4, False, True, True, 3)


def test_outliers_on_either_side_make_a_variant_with_lists() -> None:
    from kvqtool.spec import parse_spec

    assert variant_of(parse_spec("nuq4/nuq2-1%"), 128, 1).outliers
    assert not variant_of(parse_spec("nuq4"), 128, 1).outliers
