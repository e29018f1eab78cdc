"""KVQuant's levels: the weights of eq. 1 and eq. 7, the gain they are for, and moment matching."""

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from kvqtool.codebook import Codebook
from kvqtool.codec import decode, encode
from kvqtool.histogram import CHANNEL_BINS, LAYER_BINS, LevelHistogram
from kvqtool.kmeans import weighted_kmeans
from kvqtool.methods.nuq import NuqMethod
from kvqtool.spec import parse_spec

Array = NDArray[np.float64]
CPU = torch.device("cpu")


def histogram_of(
    u: Tensor, weights: Tensor | None = None, *, per_channel: bool = False
) -> LevelHistogram:
    problems, bins = (u.shape[1], CHANNEL_BINS) if per_channel else (1, LAYER_BINS)
    histogram = LevelHistogram(problems, bins, CPU)
    histogram.update(u, weights, torch.ones_like(u).bool())
    return histogram


def levels_for(u: Tensor, weights: Tensor | None = None, spec: str = "nuq3") -> Tensor:
    return NuqMethod().fit(parse_spec(spec).value, histogram_of(u, weights))[0]


def mixture() -> tuple[Array, Array]:
    """Return methods.md 7.6's data in normalised space, and each element's scale."""
    rng = np.random.default_rng(3)
    narrow = np.clip(rng.normal(0, 0.25, 20000), -1, 1)
    wide = np.clip(rng.laplace(0, 0.15, 20000), -1, 1)
    return np.concatenate([narrow, wide]), np.repeat([1.0, 10.0], 20000)


def original_error(u: Array, scale: Array, levels: Array) -> float:
    return float((scale**2 * np.abs(u[:, None] - levels).min(1) ** 2).mean())


class TestScale:
    """methods.md 7.6: clustering u, an element weighs F s^2 (eq. 7); the released code omits it."""

    @pytest.mark.parametrize(("weight", "expected"), [("F", 0.1234), ("F s^2", 0.1182)])
    def test_errors_of_both_weightings_are_the_golden_ones(
        self, weight: str, expected: float
    ) -> None:
        u, scale = mixture()
        weights = torch.from_numpy(scale**2)[:, None] if weight == "F s^2" else None
        levels = levels_for(torch.from_numpy(u)[:, None], weights)
        found = original_error(u, scale, levels.double().numpy())
        # The golden numbers are Lloyd's; an exact fit may be a little better under its own metric.
        assert found == pytest.approx(expected, rel=1e-2)

    @pytest.mark.parametrize("seed", range(4))
    def test_weighing_by_scale_never_loses_where_it_counts(self, seed: int) -> None:
        rng = np.random.default_rng(seed)
        u = np.clip(rng.standard_t(4, size=(400, 8)) / 4, -1, 1)
        scale = np.broadcast_to(rng.exponential(size=8) * 5, u.shape)
        plain = levels_for(torch.from_numpy(u)).double().numpy()
        weighted = levels_for(torch.from_numpy(u), torch.from_numpy(scale**2)).double().numpy()
        with_scale, without = (
            original_error(u.ravel(), scale.ravel(), levels) for levels in (weighted, plain)
        )
        # Histogram bins and fp16 levels move either by less than this.
        assert with_scale <= without * (1 + 2e-3)

    @pytest.mark.parametrize(("with_scale", "is_same"), [(True, True), (False, False)])
    def test_only_with_scale_do_units_not_matter(self, with_scale: bool, is_same: bool) -> None:
        """Scaling a channel by a scales its gradient by 1 / a and must change no level."""
        generator = torch.Generator().manual_seed(0)
        u = torch.randn(500, 4, generator=generator).clamp(-3, 3) / 3
        u[:, 2] = u[:, 2] ** 3
        gradient = torch.randn(500, 4, generator=generator)

        def levels(units: Tensor) -> Tensor:
            fisher = (gradient / units) ** 2
            return levels_for(u, fisher * units**2 if with_scale else fisher)

        ones, mixed = torch.ones(4), torch.tensor([1.0, 2.0, 16.0, 0.25])
        assert torch.equal(levels(ones), levels(mixed)) == is_same


class TestFit:
    @pytest.mark.parametrize("bits", (2, 3, 4, 8))
    def test_levels_ascend_and_are_fp16_numbers(self, bits: int) -> None:
        u = torch.randn(300, 8, generator=torch.Generator().manual_seed(1)).clamp(-1, 1)
        levels = levels_for(u, spec=f"nuq{bits}")
        assert levels.shape == (1 << bits,)
        assert (levels.diff() >= 0).all()
        assert torch.equal(levels, levels.half().float())

    def test_levels_are_the_optimum_of_the_data_itself(self) -> None:
        u = torch.randn(400, 1, generator=torch.Generator().manual_seed(2)).clamp(-1, 1)
        weights = torch.rand(400, 1, generator=torch.Generator().manual_seed(3))
        order = u.flatten().argsort()
        points, mass = (t.flatten()[order].double().numpy()[None] for t in (u, weights))
        exact = weighted_kmeans(points, mass, 8)[0]
        assert levels_for(u, weights).tolist() == pytest.approx(exact, abs=2e-3)

    def test_every_channel_can_be_fitted_alone(self) -> None:
        u = torch.rand(500, 5, generator=torch.Generator().manual_seed(4)) * 2 - 1
        u = u * torch.tensor([1.0, 0.5, 0.25, 0.1, 0.02])
        spec = parse_spec("nuq2-pc").key
        levels, _ = NuqMethod().fit(spec, histogram_of(u, per_channel=True))
        assert levels.shape == (5, 4)
        for channel in range(5):
            # Four levels of a uniform density lie at the middles of its quarters.
            expected = torch.tensor([-0.75, -0.25, 0.25, 0.75]) * u[:, channel].abs().max()
            assert levels[channel].tolist() == pytest.approx(expected.tolist(), abs=0.06)

    def test_states_of_no_sensitivity_still_give_a_codebook(self) -> None:
        assert levels_for(torch.rand(10, 4), torch.zeros(10, 4)).tolist() == [0.0] * 8


class TestMomentMatching:
    """methods.md 7.8, through the codec."""

    def test_decoded_states_have_the_mean_and_deviation_of_the_data(self) -> None:
        u = torch.randn(4000, 8, generator=torch.Generator().manual_seed(5)).clamp(-1, 1) * 0.9
        spec = parse_spec("nuq2-qnorm").key
        ends = torch.ones(8)
        book = Codebook(*NuqMethod().fit(spec, histogram_of(u)), -ends, ends)
        decoded = decode(encode(u, book, spec), book, spec, 8).double()
        # Bin means stand for values, and levels are fp16 numbers: 1e-3 each.
        assert decoded.mean().item() == pytest.approx(u.double().mean().item(), abs=2e-3)
        assert decoded.std().item() == pytest.approx(u.double().std().item(), rel=2e-3)

    def test_codes_are_those_without_it(self) -> None:
        u = torch.randn(400, 8, generator=torch.Generator().manual_seed(6)).clamp(-1, 1)
        plain = NuqMethod().fit(parse_spec("nuq2").key, histogram_of(u))
        matched = NuqMethod().fit(parse_spec("nuq2-qnorm").key, histogram_of(u))
        assert torch.equal(plain[0], matched[0])
        assert not torch.equal(plain[1], matched[1])
