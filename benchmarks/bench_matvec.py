"""Products with packed keys or values alone: what papers time, beside torch's product over fp16.

    python benchmarks/bench_matvec.py --spec nuq4-1%

One JSON object on stdout: microseconds in CUDA graphs over copies that exceed the L2 cache, for
codes, outliers and both, of keys and of values.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial

import torch
from contenders import contender, packed_variant
from random_pages import HEAD_DIM, Shape, random_pages
from timing import Contender, copies, interleave

from kvqtool.matvec import PARTS, Product, mix_values, score_keys
from kvqtool.memory import outliers_per_tail
from kvqtool.spec import parse_spec


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--spec", action="append")
    parser.add_argument("--shapes", action="append", help="B,HEADS,KV_HEADS,CONTEXT; repeatable")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--commit", help="the commit, for the record")
    options = parser.parse_args()
    rows = []
    for given in options.shapes or ["1,32,32,131072"]:
        shape = Shape(*map(int, given.split(",")))
        made = _fp16(shape)
        for spec in options.spec or ["nuq4-1%"]:
            made += _packed(shape, spec)
        for name, times in interleave(made, options.rounds).items():
            rows.append({"shape": given, "what": name, "us": statistics.median(times) * 1e6})
            print(f"{given} {name:32} {statistics.median(times) * 1e6:8.1f} us", file=sys.stderr)
    record = {"commit": options.commit, "date": time.strftime("%Y-%m-%d"), "rows": rows}
    print(json.dumps({"card": torch.cuda.get_device_name(), **record}, indent=1))


def _packed(shape: Shape, spec: str) -> list[Contender]:
    variant = packed_variant(shape, spec)
    per_token = 2 * outliers_per_tail(parse_spec(spec).value, shape.num_kv_heads * HEAD_DIM)
    inputs = contender(spec, shape, variant, random_pages(shape, variant, per_token)).inputs
    blocks = torch.cuda.get_device_properties(0).multi_processor_count
    query = torch.randn(shape.batch, shape.num_heads, HEAD_DIM, device="cuda").half()
    weights = torch.rand(shape.batch, shape.num_heads, shape.context, device="cuda")
    made = []
    for name, product, vector in (("keys", score_keys, query), ("values", mix_values, weights)):
        for part in PARTS:
            reads = [Product(*given, part, blocks) for given in inputs]
            calls: list[Callable[[], object]] = [partial(product, vector, read) for read in reads]
            made.append(Contender(f"{spec} {name} {part}", inputs[0][0].pages.nbytes, calls))
    return made


def _fp16(shape: Shape) -> list[Contender]:
    wide = shape.batch, shape.num_kv_heads, shape.context, HEAD_DIM
    nbytes = 2 * shape.batch * shape.num_kv_heads * shape.context * HEAD_DIM
    group = shape.num_heads // shape.num_kv_heads
    states = [torch.randn(wide, device="cuda").half() for _ in range(copies(nbytes))]
    query = torch.randn(*wide[:2], group, HEAD_DIM, device="cuda").half()
    weights = torch.rand(*wide[:2], group, shape.context, device="cuda").half()
    return [
        Contender("fp16 keys", nbytes, [partial(_product, query, s.mT) for s in states]),
        Contender("fp16 values", nbytes, [partial(_product, weights, s) for s in states]),
    ]


def _product(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    return left @ right


if __name__ == "__main__":
    main()
