"""tq against its definition in float64, and its levels against the table of Max (1960)."""

import numpy as np
import pytest
import torch

from kvqtool.codebook import Codebook
from kvqtool.hadamard import turn, turn_back
from kvqtool.methods.turboquant import TurboQuantMethod, lloyd_max_levels
from kvqtool.spec import parse_spec

# Quantizing for minimum distortion, table I: output levels and mean squared error.
MAX_1960 = {
    2: ((0.4528, 1.510), 0.1175),
    3: ((0.2451, 0.7560, 1.344, 2.152), 0.03454),
    4: ((0.1284, 0.3881, 0.6568, 0.9424, 1.256, 1.618, 2.069, 2.733), 0.009497),
}


@pytest.mark.parametrize("bits", MAX_1960)
def test_levels_are_those_of_the_table(bits: int) -> None:
    levels = lloyd_max_levels(bits)
    upper = levels[len(levels) // 2 :]
    assert upper == pytest.approx(MAX_1960[bits][0], rel=4e-4)
    assert [-level for level in reversed(levels)] == list(levels)


@pytest.mark.parametrize("bits", MAX_1960)
def test_any_vector_loses_what_the_table_says(bits: int) -> None:
    """The rotation makes coordinates normal, so the error is a constant share of the norm."""
    states = torch.rand(400, 2, 128, generator=torch.Generator().manual_seed(0)) ** 8
    spec = parse_spec(f"tq{bits}-g128").key
    method = TurboQuantMethod()
    book = Codebook(*method.fit(spec, None))
    rows = turn(states, spec).view(400, 256)
    read = method.dequantize(method.quantize(rows, book, spec), book, spec, 256)
    back = turn_back(read.view(400, 2, 128), spec)
    lost = (back - states).square().sum() / states.square().sum()
    assert lost.item() == pytest.approx(MAX_1960[bits][1], rel=0.1)


def test_it_is_the_definition() -> None:
    """Rotate, divide by the root mean square, take the nearest level, multiply again."""
    spec = parse_spec("tq3-g32").value
    states = torch.randn(6, 2, 32, generator=torch.Generator().manual_seed(1)) * 3
    method = TurboQuantMethod()
    book = Codebook(*method.fit(spec, None))
    rows = turn(states, spec)
    buffers = method.quantize(rows.view(6, 64), book, spec)
    read = method.dequantize(buffers, book, spec, 64).view(6, 2, 32)
    levels = np.float16(lloyd_max_levels(3)).astype(np.float64)
    exact = rows.double().numpy()
    norms = np.float16(np.sqrt((exact**2).mean(-1))).astype(np.float64)
    assert np.array_equal(buffers["norms"].double().numpy(), norms)
    scaled = exact / norms[..., None]
    nearest = np.abs(scaled[..., None] - levels).argmin(-1)
    assert np.abs(read.double().numpy() - levels[nearest] * norms[..., None]).max() < 1e-5


def test_the_rotation_keeps_lengths_and_undoes_itself() -> None:
    states = torch.randn(5, 3, 64, generator=torch.Generator().manual_seed(2))
    for name in ("tq3", "had3"):
        spec = parse_spec(name).key
        turned = turn(states, spec)
        lengths = turned.square().sum(-1), states.square().sum(-1)
        assert torch.allclose(*lengths, rtol=1e-5)
        assert (turn_back(turned, spec) - states).abs().max() < 1e-5


def test_a_token_of_zeros_stays_one() -> None:
    spec = parse_spec("tq2-g16").key
    method = TurboQuantMethod()
    book = Codebook(*method.fit(spec, None))
    buffers = method.quantize(torch.zeros(2, 32), book, spec)
    assert torch.equal(method.dequantize(buffers, book, spec, 32), torch.zeros(2, 32))
