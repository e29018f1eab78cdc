"""Compile the attention kernels that tests/gpu and bench_attention.py --quick use, several at once.

    python benchmarks/warm_kernels.py --also most_warps=12

CuPy keeps compiled code in its cache; what runs afterwards starts at once.
"""

from __future__ import annotations

import argparse
import multiprocessing
import sys
import time
from pathlib import Path

from bench_attention import QUICK, SPECS
from contenders import packed_variant
from random_pages import HEAD_DIM

from kvqtool.cuda import Kernel, load_kernel
from kvqtool.errors import KvqError
from kvqtool.variant import Variant, groups_of

sys.path.append(str(Path(__file__).parents[1] / "tests"))


def main() -> None:
    """Compile and print what failed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--also", action="append", default=[])
    parser.add_argument("--processes", type=int, default=14)
    options = parser.parse_args()
    started = time.perf_counter()
    variants = _variants(["", *options.also])
    with multiprocessing.get_context("spawn").Pool(options.processes) as pool:
        problems = [line for line in pool.imap_unordered(compile_variant, variants) if line]
    print(f"{len(variants)} variants in {time.perf_counter() - started:.0f} s", *problems, sep="\n")


def _variants(given: list[str]) -> list[Variant]:
    from attention_case import CASES, LONG, variant_of_case

    found = [variant_of_case(case) for case in (*CASES, *LONG)]
    for shape in QUICK:
        group = groups_of(shape.num_heads, shape.num_kv_heads)
        found.append(Variant(HEAD_DIM, 16, 16, False, False, False, group))
        found += [packed_variant(shape, spec, fields) for fields in given for spec in SPECS]
    return list(dict.fromkeys(found))


def compile_variant(variant: Variant) -> str:
    """Compile one variant; return what went wrong, or nothing."""
    try:
        load_kernel(Kernel("attend", "attend", variant.macros), variant.shared_bytes, 0)
    except KvqError as error:
        return str(error)
    return ""


if __name__ == "__main__":
    main()
