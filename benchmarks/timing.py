"""Timing on a GPU: contenders in CUDA graphs that take turns; what the card can read."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from kvqtool.fused import LayerTables, PackedContext
from kvqtool.variant import Variant

READ = r"""
extern "C" __global__ void read(const uint4* from, unsigned long long count, unsigned* to) {
    unsigned sum = 0;
    unsigned long long step = (unsigned long long)gridDim.x * blockDim.x;
    unsigned long long i = blockIdx.x * (unsigned long long)blockDim.x + threadIdx.x;
    for (; i + 3 * step < count; i += 4 * step) {
        uint4 a = from[i], b = from[i + step], c = from[i + 2 * step], d = from[i + 3 * step];
        sum += a.x ^ a.y ^ a.z ^ a.w ^ b.x ^ b.y ^ b.z ^ b.w;
        sum += c.x ^ c.y ^ c.z ^ c.w ^ d.x ^ d.y ^ d.z ^ d.w;
    }
    if (sum == 0x12345678) *to = sum;
}
"""


@dataclass(frozen=True)
class Contender:
    """A name, the bytes a launch must read, and one function per copy of its inputs."""

    name: str
    nbytes: int
    calls: list[Callable[[], object]]
    inputs: tuple[tuple[PackedContext, LayerTables, Variant], ...] = ()


def interleave(contenders: list[Contender], rounds: int) -> dict[str, list[float]]:
    """Return seconds a launch, a number a round; a round replays every contender's graph."""
    graphs = {}
    torch.cuda.synchronize()
    for contender in contenders:
        with torch.cuda.stream(torch.cuda.Stream()):
            contender.calls[0]()
            torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        slow = contender.name in ("sdpa math", "sdpa efficient") or contender.name.endswith(
            "dequantize"
        )
        launches = (contender.calls * (1 if slow else max(1, 16 // len(contender.calls))))[
            : 2 if slow else None
        ]
        with torch.cuda.graph(graph):
            for call in launches:
                call()
        graphs[contender.name] = graph, len(launches)
        graph.replay()
    times: dict[str, list[float]] = {name: [] for name in graphs}
    for _ in range(rounds):
        for name, (graph, launches) in graphs.items():
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            graph.replay()
            end.record()
            end.synchronize()
            times[name].append(begin.elapsed_time(end) / 1e3 / launches)
    return times


def copies(nbytes: int) -> int:
    """Return how many copies of a contender's inputs exceed five times the L2 cache."""
    wanted = 5 * torch.cuda.get_device_properties(0).L2_cache_size
    return max(1, -(-wanted // nbytes))


def read_rate() -> float:
    """Return the bytes a second that a kernel which only reads gets, over 4 GiB."""
    import cupy

    kernel = cupy.RawKernel(READ, "read")
    data = torch.randint(0, 2**31 - 1, (2**30,), dtype=torch.int32, device="cuda")
    out = torch.zeros(1, dtype=torch.int32, device="cuda")
    best = 0.0
    with cupy.cuda.ExternalStream(torch.cuda.current_stream().cuda_stream):
        for blocks in (132 * 4, 132 * 8, 132 * 16):
            for _ in range(4):
                begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                begin.record()
                kernel((blocks,), (512,), (data.data_ptr(), data.numel() // 4, out.data_ptr()))
                end.record()
                end.synchronize()
                best = max(best, data.numel() * 4 / (begin.elapsed_time(end) / 1e3))
    return best
