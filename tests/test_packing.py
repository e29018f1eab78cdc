"""Packing kernels, compiled for the CPU, against the codec: the same bits."""

from __future__ import annotations

import pytest
import torch
from packing_case import CASES, PackCase, build_pack, same_packed
from shim.build import HAS_COMPILER, mostly_slow, run_on_cpu

from kvqtool.code_tables import code_tables, unsupported
from kvqtool.codebook import Codebook
from kvqtool.errors import InputError
from kvqtool.packing import pack
from kvqtool.spec import parse_spec

needs_compiler = pytest.mark.skipif(not HAS_COMPILER, reason="g++ is not installed")


QUICK = (
    PackCase("nuq4-5%/nuq2-1%", batch=3, tokens=66),
    PackCase(bfloat16=True, tied=True),
    PackCase("nuq4-1%/nuq3-1%", tokens=66, crowded=True),
    PackCase("nuq3-1%-pc-comp/nuq3-1%-comp", tokens=70, batch=2),
    PackCase("nuq4-1%/nuq2-5%-vrot-comp", head_dim=96, tokens=66, tied=True),
)


@needs_compiler
@pytest.mark.parametrize("case", mostly_slow(QUICK, CASES), ids=str)
def test_packed_pages_equal_the_codec_bit_for_bit(case: PackCase) -> None:
    built = build_pack(case)
    found = pack(built.prompt, built.turns, built.code, built.tables, built.variant, run_on_cpu)
    same_packed(found, built.expected)


def test_pages_hold_outliers() -> None:
    built = build_pack(PackCase())
    assert torch.count_nonzero(built.expected.pages.outlier_words) > 100


@pytest.mark.parametrize(
    ("spec", "what"),
    [
        ("nuq8-1%-comp", "8-bit codes that are compensated or of rotated values"),
        ("nuq3-1%/nuq8-vrot", "8-bit codes that are compensated or of rotated values"),
        ("nuq8-1%-pc/nuq3", "codebooks per channel of 8-bit keys"),
        ("nuq3-1%-pertoken", "keys with a range per token"),
        ("qaq-nuq-1%", "bits by token"),
        ("nuq3-1%-cap4", "a cap on key outliers"),
        ("had4-g64", "had codes"),
        ("nuq3-1%/tq4-g64", "tq codes"),
        ("fp", "states that are not codes"),
    ],
)
def test_schemes_the_kernels_do_not_know_are_refused(spec: str, what: str) -> None:
    assert unsupported(parse_spec(spec)) == what


def test_the_refusal_names_the_scheme_and_the_remedy() -> None:
    spec = parse_spec("nuq3-1%-cap4")
    book = Codebook(torch.zeros(8), torch.zeros(8))
    with pytest.raises(
        InputError, match=r"nuq3-1%-cap4.*a cap on key outliers; use the torch path"
    ):
        code_tables(spec, (book, book), 256)
