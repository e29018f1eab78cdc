"""Outliers: which, how many, and what is stored of them, against plain loops."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from kvqtool.memory import outliers_per_tail
from kvqtool.outliers import cap_mask, extract, rank_mask, restore, threshold_mask
from kvqtool.spec import parse_spec

VALUES = parse_spec("nuq3-1%").value


def normal(rows: int, channels: int, seed: int = 0) -> Tensor:
    return torch.randn(rows, channels, generator=torch.Generator().manual_seed(seed))


class TestCounts:
    @pytest.mark.parametrize(
        ("channels", "per_tail"),
        list(
            zip(
                (64, 128, 256, 512, 1024, 2048, 4096, 5120, 8192),
                (1, 1, 2, 3, 6, 11, 21, 26, 41),
                strict=True,
            )
        ),
    )
    def test_one_percent_is_this_many_at_each_end(self, channels: int, per_tail: int) -> None:
        """methods.md 7.1."""
        assert outliers_per_tail(VALUES, channels) == per_tail
        mask = rank_mask(normal(3, channels), per_tail)
        assert mask.sum(1).tolist() == [2 * per_tail] * 3

    @pytest.mark.parametrize("channels", (64, 512, 4096))
    def test_inclusive_quantiles_of_distinct_values_mark_as_many(self, channels: int) -> None:
        """methods.md 7.1: numpy's quantile thresholds, ends included, agree with the rank rule."""
        states = normal(1, channels, seed=5)
        low, high = np.quantile(states.double().numpy(), [0.005, 0.995])
        per_tail = outliers_per_tail(VALUES, channels)
        assert int((states < low).sum()) == int((states > high).sum()) == per_tail
        beyond = (states < low) | (states > high)
        assert torch.equal(rank_mask(states, per_tail), beyond)

    def test_a_constant_token_has_exactly_as_many(self) -> None:
        """methods.md 7.1: never all of them."""
        assert rank_mask(torch.ones(2, 256), 2).sum(1).tolist() == [4, 4]

    @pytest.mark.parametrize("share", (0.001, 0.01, 0.02, 0.05, 0.1))
    @pytest.mark.parametrize("channels", (96, 100, 192, 1000))
    def test_a_share_is_rounded_up_exactly(self, share: float, channels: int) -> None:
        spec = parse_spec(f"nuq3-{share * 100:g}%").value
        # Exact in thousandths, where share / 2 * channels in floating point may end just above.
        expected = -(-round(share * 1000) * channels // 2000)
        assert outliers_per_tail(spec, channels) == expected
        assert expected >= math.floor(share / 2 * channels)


class TestRankMask:
    @pytest.mark.parametrize("per_tail", (1, 2, 5))
    def test_it_marks_the_ends_of_a_stable_order(self, per_tail: int) -> None:
        states = normal(7, 40).round(decimals=1)  # ties
        expected = np.zeros((7, 40), bool)
        for row, values in enumerate(states.tolist()):
            order = sorted(range(40), key=lambda i, values=values: (values[i], i))
            expected[row, order[:per_tail] + order[-per_tail:]] = True
        assert rank_mask(states, per_tail).tolist() == expected.tolist()


class TestThresholds:
    def test_only_what_lies_strictly_outside_is_marked(self) -> None:
        lower, upper = torch.tensor([-1.0, -1.0, 0.0]), torch.tensor([1.0, 1.0, 0.0])
        states = torch.tensor([[-1.0, 1.5, 0.0], [-1.1, 1.0, 0.1]])
        mask = threshold_mask(states, lower, upper)
        assert mask.tolist() == [[False, True, False], [True, False, True]]

    def test_a_token_may_hold_none_or_only_outliers(self) -> None:
        ends = torch.ones(8)
        mask = threshold_mask(torch.tensor([[0.0] * 8, [2.0] * 8]), -ends, ends)
        assert mask.sum(1).tolist() == [0, 8]


class TestCap:
    @pytest.mark.parametrize("cap", (1, 2, 5, 39))
    def test_it_keeps_the_farthest_and_of_equals_the_first(self, cap: int) -> None:
        distance = normal(6, 40).abs().round(decimals=1)
        mask = distance > 0.5
        kept = cap_mask(mask, distance, cap)
        for row in range(6):
            far = [i for i in range(40) if mask[row, i]]
            far.sort(key=lambda i, row=row: (-float(distance[row, i]), i))
            assert kept[row].nonzero().flatten().tolist() == sorted(far[:cap])

    def test_nothing_unmarked_is_kept_to_fill_the_cap(self) -> None:
        mask = torch.tensor([[False, True, False, False]])
        assert torch.equal(cap_mask(mask, torch.ones(1, 4), 3), mask)

    def test_low_outliers_are_kept_as_well_as_high_ones(self) -> None:
        """The released code compares an absolute value with a negative bound, and keeps none."""
        u = torch.tensor([[-9.0, 0.1, 2.0, -3.0]])
        assert cap_mask(u.abs() > 1, u.abs(), 2).tolist() == [[True, False, False, True]]


class TestSparseForm:
    @pytest.mark.parametrize("channels", (96, 255, 256, 257, 600))
    def test_values_lie_in_row_and_channel_order(self, channels: int) -> None:
        states = normal(5, channels)
        mask = states.abs() > 1.5
        buffers = extract(states, mask, with_counts=True)
        rows, columns = np.nonzero(mask.numpy())
        values = states.numpy()[rows, columns].astype(np.float16)
        assert buffers["outlier_channels"].tolist() == columns.tolist()
        assert buffers["outlier_values"].numpy().tolist() == values.tolist()
        assert buffers["outlier_counts"].tolist() == np.bincount(rows, minlength=5).tolist()

    @pytest.mark.parametrize(
        ("channels", "index", "count"),
        [
            (192, torch.uint8, torch.uint8),
            (255, torch.uint8, torch.uint8),
            (256, torch.uint8, torch.int16),
            (257, torch.int16, torch.int16),
        ],
    )
    def test_indices_are_as_wide_as_the_channels_need(
        self, channels: int, index: torch.dtype, count: torch.dtype
    ) -> None:
        buffers = extract(torch.ones(1, channels), torch.ones(1, channels).bool(), with_counts=True)
        assert (buffers["outlier_channels"].dtype, buffers["outlier_counts"].dtype) == (
            index,
            count,
        )
        assert buffers["outlier_channels"].tolist() == list(range(channels))
        assert buffers["outlier_counts"].tolist() == [channels]

    def test_equal_counts_are_not_stored(self) -> None:
        mask = rank_mask(normal(2, 64), 1)
        assert "outlier_counts" not in extract(normal(2, 64), mask, with_counts=False)

    @pytest.mark.parametrize("with_counts", (True, False))
    def test_restoring_writes_them_over_and_nothing_else(self, with_counts: bool) -> None:
        states, other = normal(9, 64), normal(9, 64, seed=1)
        mask = rank_mask(states, 2)
        buffers = extract(states, mask, with_counts=with_counts)
        restored = restore(other.clone(), buffers, per_row=4)
        assert torch.equal(restored, torch.where(mask, states.half().float(), other))

    def test_rows_without_outliers_are_passed_over(self) -> None:
        states = normal(6, 64)
        mask = states > torch.tensor([9.0, 1.0, 9.0, 9.0, 1.0, 9.0])[:, None]
        restored = restore(torch.zeros(6, 64), extract(states, mask, with_counts=True), per_row=0)
        assert torch.equal(restored, (states * mask).half().float())

    def test_values_beyond_half_precision_end_at_its_ends(self) -> None:
        states = torch.tensor([[1e6, -1e6, 0.0]])
        buffers = extract(states, states != 0, with_counts=True)
        assert buffers["outlier_values"].tolist() == [65504.0, -65504.0]
