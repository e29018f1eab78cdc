"""The bit stream: golden words, and a stream of digits spelled out in Python as the truth."""

import pytest
import torch
from torch import Tensor

from kvqtool.bits import pack_codes, unpack_words

WIDTHS = range(1, 9)
CHANNELS = (1, 7, 8, 31, 32, 33, 64, 80, 96, 128, 192, 256)


def stream_of(codes: list[int], bits: int) -> list[int]:
    """Return the words of one row, unsigned, by writing its codes into one big integer."""
    number = sum(code << (bits * i) for i, code in enumerate(codes))
    count = -(-len(codes) * bits // 32)
    return [number >> (32 * i) & 0xFFFFFFFF for i in range(count)]


def unsigned(words: Tensor) -> list[list[int]]:
    return [[word & 0xFFFFFFFF for word in row] for row in words.tolist()]


def random_codes(rows: int, channels: int, bits: int) -> Tensor:
    generator = torch.Generator().manual_seed(bits * 1000 + channels)
    return torch.randint(0, 1 << bits, (rows, channels), generator=generator)


@pytest.mark.parametrize(
    ("bits", "words"),
    [
        (2, "1b1b1b1b 1b1b1b1b"),
        (3, "53977053 70539770 97705397"),
        (4, "4d6f81a3 c5e7092b 4d6f81a3 c5e7092b"),
    ],
)
def test_known_codes_make_the_golden_words(bits: int, words: str) -> None:
    """methods.md 7.3."""
    codes = torch.tensor([[(7 * i + 3) % (1 << bits) for i in range(32)]])
    assert unsigned(pack_codes(codes, bits)) == [[int(word, 16) for word in words.split()]]


@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize("channels", CHANNELS)
def test_words_are_one_little_endian_stream_per_row(bits: int, channels: int) -> None:
    codes = random_codes(3, channels, bits)
    assert unsigned(pack_codes(codes, bits)) == [stream_of(row, bits) for row in codes.tolist()]


@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize("channels", CHANNELS)
def test_unpacking_gives_the_codes_back(bits: int, channels: int) -> None:
    """methods.md 7.3, round trip."""
    codes = random_codes(5, channels, bits)
    assert torch.equal(unpack_words(pack_codes(codes, bits), bits, channels).long(), codes)


@pytest.mark.parametrize("bits", WIDTHS)
def test_the_greatest_code_survives_in_every_lane(bits: int) -> None:
    codes = torch.full((1, 96), (1 << bits) - 1)
    assert torch.equal(unpack_words(pack_codes(codes, bits), bits, 96).long(), codes)


@pytest.mark.parametrize("bits", (2, 3, 4, 8))
def test_no_rows_make_no_words(bits: int) -> None:
    words = pack_codes(torch.empty(0, 96, dtype=torch.int64), bits)
    assert words.shape == (0, 3 * bits)
    assert unpack_words(words, bits, 96).shape == (0, 96)


def test_strided_codes_pack_like_a_copy_of_them() -> None:
    codes = random_codes(96, 5, 3).T
    assert not codes.is_contiguous()
    assert torch.equal(pack_codes(codes, 3), pack_codes(codes.contiguous(), 3))


def test_words_are_32_bit_integers_in_their_own_memory() -> None:
    words = pack_codes(random_codes(4, 33, 3), 3)
    assert words.dtype == torch.int32
    assert words.is_contiguous()
    assert words.untyped_storage().nbytes() == 4 * 4 * 4
