"""The quantile sketch against NumPy's quantiles, and its promise that order does not matter."""

import numpy as np
import pytest
import torch
from torch import Tensor

from kvqtool.errors import RunError
from kvqtool.quantiles import BINS, ChannelQuantiles

CPU = torch.device("cpu")
SHARES = (0.0, 0.0005, 0.005, 0.05, 0.5, 0.95, 0.995, 0.9995, 1.0)


def sketch_of(*batches: Tensor) -> ChannelQuantiles:
    sketch = ChannelQuantiles(batches[0].shape[1], CPU)
    for batch in batches:
        sketch.update(batch)
    return sketch


def states(rows: int = 4000, channels: int = 6, seed: int = 0) -> Tensor:
    """Return channels that differ in scale, offset and tails."""
    rng = np.random.default_rng(seed)
    normal = rng.normal(size=(rows, channels)) * 10.0 ** rng.uniform(-3, 3, channels)
    normal[:, 0] = rng.standard_t(3, size=rows)
    normal[:, 1] += 50 * normal[:, 1].std()
    return torch.from_numpy(normal).float()


@pytest.mark.parametrize("share", SHARES)
def test_quantiles_are_numpys_within_a_bin(share: float) -> None:
    data = states()
    expected = np.quantile(data.double().numpy(), share, axis=0)
    found = sketch_of(data).quantile(share).numpy()
    # A sketch has at least BINS / 2 bins between a channel's ends.
    bin_width = (data.amax(0) - data.amin(0)).numpy() * (2 / BINS)
    assert (np.abs(found - expected) <= bin_width).all()


def test_the_ends_are_exact() -> None:
    data = states()
    sketch = sketch_of(data)
    assert torch.equal(sketch.minimum, data.amin(0))
    assert torch.equal(sketch.maximum, data.amax(0))


@pytest.mark.parametrize("share", (0.005, 0.5, 0.995))
def test_batches_in_any_order_and_size_give_the_same_bits(share: float) -> None:
    data = states()
    at_once = sketch_of(data).quantile(share)
    backwards = sketch_of(*data.flip(0).split(317)).quantile(share)
    shuffled = data[torch.randperm(len(data), generator=torch.Generator().manual_seed(1))]
    assert torch.equal(at_once, backwards)
    assert torch.equal(at_once, sketch_of(*shuffled.split(1000)).quantile(share))


@pytest.mark.parametrize("power", (-100, 100))
def test_values_of_any_size_have_the_quantiles_of_others(power: int) -> None:
    data = states()
    scaled = sketch_of(data * 2.0**power)
    for share in (0.005, 0.5, 0.995):
        expected = sketch_of(data).quantile(share) * 2.0**power
        assert torch.equal(scaled.quantile(share), expected)


def test_memory_does_not_grow_with_the_stream() -> None:
    def size(sketch: ChannelQuantiles) -> int:
        return sum(t.untyped_storage().nbytes() for t in vars(sketch).values())

    assert size(sketch_of(states(10))) == size(sketch_of(*[states(2000, seed=i) for i in range(5)]))


def test_widening_loses_no_count() -> None:
    data = torch.cat([torch.randn(100, 2) * 10.0**power for power in range(-6, 7)])
    sketch = sketch_of(*data.split(100))
    assert sketch._counts.sum(1).tolist() == [1300, 1300]


def test_a_constant_channel_has_its_value_at_every_share() -> None:
    sketch = sketch_of(torch.full((50, 1), -3.7))
    assert [sketch.quantile(q).item() for q in (0.0, 0.5, 1.0)] == pytest.approx([-3.7] * 3)


def test_a_channel_of_zeros_stays_zero() -> None:
    assert sketch_of(torch.zeros(50, 3)).quantile(0.5).tolist() == [0.0] * 3


def test_one_value_is_every_quantile() -> None:
    sketch = sketch_of(torch.tensor([[2.5]]))
    assert sketch.quantile(0.995).item() == 2.5


def test_tiny_and_huge_channels_do_not_disturb_each_other() -> None:
    data = torch.stack([torch.linspace(0, 1e-30, 1001), torch.linspace(-1e30, 1e30, 1001)], 1)
    found = sketch_of(data).quantile(0.75).tolist()
    assert found == pytest.approx([0.75e-30, 0.5e30], rel=2e-3)


@pytest.mark.parametrize("bad", (float("nan"), float("inf"), float("-inf")))
def test_values_that_are_not_finite_are_refused(bad: float) -> None:
    data = states(10)
    data[3, 2] = bad
    with pytest.raises(RunError, match="NaN or infinity; calibrate in float32"):
        sketch_of(data)
