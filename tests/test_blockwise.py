"""Attention joined from parts against attention to everything at once, in float64."""

from __future__ import annotations

import pytest
import torch
from stores_case import DIM, HEADS, Both
from torch import Tensor

from kvqtool.blockwise import attend_causal
from kvqtool.live import watch
from kvqtool.masks import band_mask, causal_mask, is_mark


def states(heads: int, tokens: int, seed: int) -> Tensor:
    random = torch.Generator().manual_seed(seed)
    return torch.randn(2, heads, tokens, 16, generator=random) * 2


def at_once(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    repeats = query.shape[1] // key.shape[1]
    key, value = (part.double().repeat_interleave(repeats, 1) for part in (key, value))
    score = query.double() @ key.mT * scale
    seen = causal_mask(query.shape[2], key.shape[2], query.device)
    return score.masked_fill(~seen, -torch.inf).softmax(-1) @ value


@pytest.mark.parametrize("heads", (2, 6))
@pytest.mark.parametrize("sizes", [(40,), (7, 20, 13), (1, 24, 15), (33, 4, 3), (30, 10)])
def test_parts_give_what_all_at_once_does(sizes: tuple[int, ...], heads: int) -> None:
    query, key, value = states(heads, 10, 0), states(2, 40, 1), states(2, 40, 2)
    parts = zip(key.split(sizes, dim=2), value.split(sizes, dim=2), strict=True)
    found = attend_causal(query, parts, 30, 0.25)
    assert (found - at_once(query, key, value, 0.25)).abs().max() < 1e-5


def test_scores_far_apart_leave_no_nan() -> None:
    query, key, value = states(2, 3, 0) * 1e3, states(2, 40, 1), states(2, 40, 2)
    parts = zip(key.split(8, dim=2), value.split(8, dim=2), strict=True)
    found = attend_causal(query, parts, 37, 1.0)
    assert (found - at_once(query, key, value, 1.0)).abs().max() < 1e-3


def test_a_longer_past_takes_no_more_for_a_moment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvqtool.scratch.ELEMENTS_AT_ONCE", 128 * HEADS * DIM)
    peaks = []
    for past in (512, 2048):
        both = Both("nuq3-1%")
        both.append(past, 64)
        first = torch.zeros(1, dtype=torch.int32)
        context = both.closed.context(both.angles, first, 0)
        query = torch.randn(1, 2 * HEADS, 64, DIM).half()
        with watch(both.device) as live:
            both.reader.attend_causal(query, context, 0.125)
        peaks.append(live.peak_bytes)
    assert peaks[1] < 1.05 * peaks[0]


def test_rotated_values_without_a_tail_are_decoded() -> None:
    both = Both("nuq3-1%/nuq3-1%-vrot")
    both.append(128)
    context = both.closed.context(both.angles, torch.zeros(1, dtype=torch.int32), 0)
    for part, exact in zip(both.reader.expand(context), both.rows.read(both.angles), strict=True):
        assert (part - exact).abs().max() < 2e-2


PLAIN = {"batch_size": 2, "q_length": 3, "kv_length": 8, "q_offset": 5}


@pytest.mark.parametrize(
    ("changed", "marked"),
    [
        ({}, True),
        ({"attention_mask": torch.ones(2, 8, dtype=torch.bool)}, True),
        ({"attention_mask": torch.tensor([[False] + [True] * 7] * 2)}, False),
        ({"allow_is_causal_skip": False}, False),
        ({"local_size": 4}, False),
        ({"q_offset": 4}, False),
        ({"q_length": 8, "q_offset": 0}, False),
        ({"q_length": 1, "q_offset": 7}, False),
        ({"mask_function": lambda b, h, q, k: k <= q}, False),
    ],
)
def test_plain_causal_order_is_marked(changed: dict[str, object], marked: bool) -> None:
    from transformers.masking_utils import causal_mask_function

    mask = band_mask(**{"mask_function": causal_mask_function} | PLAIN | changed)
    assert is_mark(mask) == marked


def test_a_mark_shows_nothing_and_takes_nothing() -> None:
    from transformers.masking_utils import causal_mask_function

    mask = band_mask(mask_function=causal_mask_function, **PLAIN)
    assert mask is not None
    assert mask.shape == (2, 1, 3, 8)
    assert not mask.any()
    assert mask.untyped_storage().nbytes() == 1
    assert is_mark(mask[:, :, :, :5])
    # As accelerate sends it to the next device of a spread model.
    assert is_mark(mask.to(torch.device("meta"), non_blocking=False))
    assert is_mark(mask.to("meta").to("meta"))
