"""Where the time of a fused attention launch goes: the cycles between marks in kernels/attend.cu.

    python benchmarks/profile_attend.py --shapes 1,32,8,4096 --spec nuq4-1%

The source is compiled with a clock read after each step of a block. A row a step: cycles since the
step before, of the first thread of each block, median and greatest over blocks, the last of 20
launches; then nanoseconds from the first block's start to the last one's end.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from bench_attention import contender, packed_variant
from random_pages import HEAD_DIM, Shape, random_pages

from kvqtool import cuda
from kvqtool.cuda import Kernel, compile_options, source_text
from kvqtool.memory import outliers_per_tail
from kvqtool.spec import parse_spec

# What follows each of these lines is another step.
STEPS: Final = (
    ("plan", "    u32 number = thread_index() / 32;\n"),
    ("find segment", "        u32 from = unit - segment.start, until"),
    ("send first chunks", "        if (ready) sync_block();"),
    ("query, key table", "        if (!ready) fill_tables"),
    ("tables", "        await_copies<DEPTH - 1>();"),
    ("wait for all", "        if (begins < ends) {\n"),
    ("units of warp 0", "            leave_result(warp"),
    ("leave result, wait", "        u16* out = output"),
    ("join warps", "        if (segment.blocks > 1) {\n"),
    ("join blocks", "        unit += cut.whole"),
)
MARK = r"""
__device__ unsigned long long kvq_marks[132 * 8][16];
__device__ __forceinline__ void kvq_mark(int n) {
    if (threadIdx.x) return;
    unsigned long long now;
    asm volatile("mov.u64 %0, %clock64;" : "=l"(now) :: "memory");
    kvq_marks[blockIdx.x][n] = now;
    asm volatile("mov.u64 %0, %globaltimer;" : "=l"(now) :: "memory");
    if (n == 0) kvq_marks[blockIdx.x][14] = now;
    kvq_marks[blockIdx.x][15] = now;
}
KERNEL(THREADS)
attend("""


def marked_source() -> str:
    """Return the source of attend with a mark after every step.

    Raises:
        ValueError: when the source no longer has a line that a mark stands at.
    """
    text = source_text("attend")
    head, body = text.split("KERNEL(THREADS)\nattend(")
    begin = "    u8* shared = shared_memory();\n"
    for number, (_, line) in enumerate(((None, begin), *STEPS)):
        if body.count(line) != 1:
            raise ValueError(f"attend.cu has {body.count(line)} lines {line.strip()!r}, expected 1")
        body = body.replace(line, f"    kvq_mark({number});\n{line}")
    return head + MARK + body


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--spec", action="append")
    parser.add_argument("--shapes", action="append", help="B,HEADS,KV_HEADS,CONTEXT; repeatable")
    parser.add_argument("--fields", default="", help="as bench_attention.py --also")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        marked_source()
        sys.exit("no GPU: the source takes its marks, nothing was timed")
    for text in options.spec or ["nuq4-1%"]:
        for given in options.shapes or ["1,32,8,4096"]:
            _profile(text, Shape(*map(int, given.split(","))), options.fields)


def _profile(text: str, shape: Shape, fields: str) -> None:
    import cupy

    variant = packed_variant(shape, text, fields)
    per_token = 2 * outliers_per_tail(parse_spec(text).value, shape.num_kv_heads * HEAD_DIM)
    module = cupy.RawModule(code=marked_source(), options=compile_options(variant.macros))
    function = module.get_function("attend")
    function.max_dynamic_shared_size_bytes = variant.shared_bytes

    def load(kernel: Kernel, shared_bytes: int, device_index: int) -> Any:
        return function

    cuda.load_kernel = load  # type: ignore[assignment]  # the marked kernel in place of its own
    made = contender(text, shape, variant, random_pages(shape, variant, per_token))
    for _ in range(20):
        made.calls[0]()
    torch.cuda.synchronize()
    blocks = torch.cuda.get_device_properties(0).multi_processor_count
    address = module.get_global("kvq_marks")
    marks = cupy.ndarray((132 * 8, 16), cupy.uint64, address).get()[:blocks].astype(np.int64)
    marks = marks[marks[:, 1] > 0]
    print(f"{text} {shape} {len(marks)} blocks, {variant.warps} warps")
    spent = np.diff(marks[:, : len(STEPS) + 1], axis=1)
    for number, (name, _) in enumerate(STEPS):
        print(f"  {name:20} {np.median(spent[:, number]):8.0f} {spent[:, number].max():8}")
    print(f"  {'all, ns':20} {marks[:, 15].max() - marks[:, 14].min():8}")


if __name__ == "__main__":
    sys.path.append(str(Path(__file__).parent))
    main()
