"""Where the time of a fused attention launch goes: cycles between marks in kernels/attend.cu.

    python benchmarks/profile_attend.py --shapes 1,32,8,4096 --spec nuq4-1%

The source is compiled twice with clock reads: after each step of a block, and between the parts of
a slab. Of each step, the cycles of a block's first thread, median and greatest over blocks, last of
20 launches, and nanoseconds from the first block's start to the last one's end; of each part of a
slab, the cycles a slab of a block's first warp, other warps' instructions in between included.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import torch
from contenders import contender, packed_variant
from random_pages import HEAD_DIM, Shape, random_pages

from kvqtool import cuda
from kvqtool.cuda import Kernel, compile_options, source_text
from kvqtool.memory import outliers_per_tail
from kvqtool.spec import parse_spec
from kvqtool.variant import Variant

DECLARED: Final = r"""
__device__ unsigned long long kvq_marks[132][16];
__device__ __forceinline__ unsigned long long kvq_nanoseconds() {
    unsigned long long now;
    asm volatile("mov.u64 %0, %globaltimer;" : "=l"(now) :: "memory");
    return now;
}
__device__ __forceinline__ void kvq_step(int n) {
    if (threadIdx.x) return;
    kvq_marks[blockIdx.x][n] = clock64();
    if (n == 0) kvq_marks[blockIdx.x][14] = kvq_nanoseconds();
    kvq_marks[blockIdx.x][15] = kvq_nanoseconds();
}
__device__ __forceinline__ void kvq_part(int n) {
    __shared__ unsigned last;
    if (threadIdx.x) return;
    unsigned now = clock();
    if (n) kvq_marks[blockIdx.x][n] += now - last;
    if (n == 1) kvq_marks[blockIdx.x][0]++;
    last = now;
}
"""


@dataclass(frozen=True)
class Marks:
    """Marks of a kind: a function, and for each what ended there and the line it stands before."""

    function: str
    places: tuple[tuple[str, str], ...]

    def put(self, text: str) -> str:
        """Return the source with the marks in it.

        Raises:
            ValueError: when the source no longer has a line that a mark stands before.
        """
        for number, (_, line) in enumerate(self.places):
            if text.count(line) != 1:
                raise ValueError(f"attend.cu has {text.count(line)} times {line!r}, expected 1")
            text = text.replace(line, f"{self.function}({number});\n{line}")
        return text.replace("constexpr u32 THREADS", DECLARED + "constexpr u32 THREADS", 1)


STEPS: Final = Marks("kvq_step", (
    ("", "    u32 number = thread_index() / 32, lane"),
    ("plan", "    const float* shared_query = "),
    ("find segment", "        Range range = range_of_block(cut"),
    ("ask for slabs", "        // While the loads are under way:\n"),
    ("tables", "        if (begins < stop) {\n"),
    ("send first chunks", "        await_copies<DEPTH - 1>();"),
    ("wait, query", "        if (begins < ends) {\n"),
    ("units of warp 0", "            leave_result(warp"),
    ("leave result, wait", "        give_result(results"),
    ("join warps", "    if (kept.blocks == 1) return;\n"),
    ("join blocks", "        unit = kept->next"),
))  # fmt: skip
PARTS: Final = Marks("kvq_part", (
    ("", "    if (first < segment.slabs) {\n        u32 turned_page"),
    ("turn to slab, query", "    const Slab& slab = stream.slab;\n"),
    ("outliers of keys", "    KVQ_UNROLL for (u32 step = 0; step < STEPS"),
    ("keys", "    cap_scores(score, cap);\n    u32 weights[4][2];\n    soften(warp, score, VALUE"),
    ("soften", "        u32 count = outlier_words(slab, 1);\n"),
    ("outliers of values", "    KVQ_UNROLL for (u32 m = 0; m < STEPS; m++) {\n        u32 words"),
    ("values", "            stream.parity ^= 1;\n"),
))  # fmt: skip


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--spec", action="append")
    parser.add_argument("--shapes", action="append", help="B,HEADS,KV_HEADS,CONTEXT; repeatable")
    parser.add_argument("--fields", default="", help="as bench_attention.py --also")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        for marks in (STEPS, PARTS):
            marks.put(source_text("attend"))
        sys.exit("no GPU: the source takes its marks, nothing was timed")
    for text in options.spec or ["nuq4-1%"]:
        for given in options.shapes or ["1,32,8,4096"]:
            shape = Shape(*map(int, given.split(",")))
            variant = packed_variant(shape, text, options.fields)
            steps, parts = (_run(marks, text, shape, variant) for marks in (STEPS, PARTS))
            print(f"{text} {options.fields} {given}: {len(steps)} blocks, {variant.warps} warps")
            _print_steps(steps)
            _print_parts(parts)


def _print_steps(marks: np.ndarray[Any, np.dtype[np.int64]]) -> None:
    spent = np.diff(marks[:, : len(STEPS.places)], axis=1)
    for number, (name, _) in enumerate(STEPS.places[1:]):
        print(f"  {name:20} {np.median(spent[:, number]):8.0f} {spent[:, number].max():8}")
    print(f"  {'all, nanoseconds':20} {marks[:, 15].max() - marks[:, 14].min():8}")


def _print_parts(marks: np.ndarray[Any, np.dtype[np.int64]]) -> None:
    slabs = marks[:, 0].sum()
    for number, (name, _) in enumerate(PARTS.places):
        if number:
            print(f"    {name:20} {marks[:, number].sum() / slabs:8.0f}")


def _run(
    marks: Marks, text: str, shape: Shape, variant: Variant
) -> np.ndarray[Any, np.dtype[np.int64]]:
    """Return (blocks, 16) of the marks that 20 launches leave."""
    import cupy

    source = marks.put(source_text("attend"))
    module = cupy.RawModule(code=source, options=compile_options(variant.macros))
    function = module.get_function("attend")
    function.max_dynamic_shared_size_bytes = variant.shared_bytes

    def load(kernel: Kernel, shared_bytes: int, device_index: int) -> Any:
        return function.kernel

    cuda.load_kernel = load  # type: ignore[assignment]  # the marked kernel in place of its own
    per_token = 2 * outliers_per_tail(parse_spec(text).value, shape.num_kv_heads * HEAD_DIM)
    made = contender(text, shape, variant, random_pages(shape, variant, per_token))
    for number in range(20):
        made.calls[number % len(made.calls)]()
    torch.cuda.synchronize()
    address = module.get_global("kvq_marks")
    found = cupy.ndarray((132, 16), cupy.uint64, address).get().astype(np.int64)
    return found[found[:, 1] > 0]


if __name__ == "__main__":
    main()
