"""Kernels stay inside their tensors and their shared memory: quick cases once more, on the CPU with
every access checked.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from shim.build import HAS_COMPILER, run_checked

TESTS = Path(__file__).parent
FILES = ("test_matvec", "test_attend_shim", "test_packing", "test_appending", "test_dequantize")
PAST_THE_END = """
from dataclasses import replace
import torch
from attention_case import Case, build
from kvqtool.matvec import Product, mix_values
from shim.build import run_on_cpu
built = build(Case("nuq4-1%", (70,), num_kv_heads=1))
pages = built.context.pages
cut = replace(pages, outlier_words=pages.outlier_words[:-16].clone())
context = replace(built.context, pages=cut)
product = Product(context, built.tables, replace(built.variant, most_warps=2), "outliers")
mix_values(torch.ones(1, 1, 128), product, run_on_cpu)
"""
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not HAS_COMPILER, reason="g++ is not installed"),
]


@pytest.mark.parametrize("file", FILES)
def test_quick_cases_stay_inside(file: str) -> None:
    done = run_checked("-m", "pytest", "-q", "-p", "no:cacheprovider", f"{TESTS}/{file}.py")
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]


def test_a_word_past_the_end_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", f"{TESTS}:{TESTS.parent}")
    done = run_checked("-c", PAST_THE_END)
    assert "heap-buffer-overflow" in done.stderr
