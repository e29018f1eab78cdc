"""What packing a prompt and appending a token cost, beside the card's copy rate.

    python benchmarks/bench_packing.py

Packing: the whole of `packing.pack`, the host's part included; bytes read and written. `one_call`
is waited for before the next one starts; `in_a_row` is the mean of many calls that follow each
other, as those of a prompt's layers do, the GPU waited for only as often as `pack` itself waits.
Beside these where the time goes: each kernel alone, without the host's part, and, as far as torch's
profiler sees the GPU, how long that works in a call and how long it waits for the host.
Appending: one layer's kernel inside a CUDA graph. One JSON object on stdout.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from kvqtool.appending import append, new_pages
from kvqtool.cuda import Argument, Kernel, run_on_gpu
from kvqtool.packing import Packed, pack

sys.path.append(str(Path(__file__).parents[1] / "tests"))
from moved import moved
from packing_case import PackCase, build_pack

PROMPTS = (
    (PackCase("nuq4-1%", 256, num_kv_heads=32), 32768),
    (PackCase("nuq3-1%", 256, num_kv_heads=8), 131072),
    (PackCase("nuq3-1%-pc-comp/nuq3-1%-comp", 256, num_kv_heads=8), 32768),
)
TOKENS = (
    PackCase("nuq4-1%", 256, num_kv_heads=8),
    PackCase("nuq4-1%", 256, num_kv_heads=32),
    PackCase("nuq3-1%", 256, batch=4, num_kv_heads=8),
    PackCase("nuq3-1%-pc-comp/nuq3-1%-comp", 256, num_kv_heads=8),
    PackCase("nuq3-1%-pc-comp/nuq3-1%-comp", 256, num_kv_heads=32),
)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--commit", help="the commit, for the record")
    options = parser.parse_args()
    copy = _copy_rate()
    record = {
        "commit": options.commit,
        "date": time.strftime("%Y-%m-%d"),
        "card": torch.cuda.get_device_name(),
        "copy_gb_per_second": copy / 1e9,
        "pack": [_pack_row(case, tokens, copy) for case, tokens in PROMPTS],
        "append": [_append_row(case) for case in TOKENS],
    }
    print(json.dumps(record, indent=1))


def _pack_row(case: PackCase, tokens: int, copy: float) -> dict[str, object]:
    built, repeats = moved(build_pack(case), "cuda"), tokens // case.tokens
    key, value = (part.repeat(1, 1, repeats, 1) for part in built.prompt)
    turns = built.turns.repeat(1, repeats, 1, 1)

    def call(run: Callable[..., None] = run_on_gpu) -> Packed:
        return pack((key, value), turns, built.code, built.tables, built.variant, run)

    times = [_seconds(call) for _ in range(22)][2:]
    rows = [_seconds(call, calls=16) for _ in range(5)]
    nbytes = 2 * 2 * key.numel() + call().pages.nbytes

    def row(seconds: float) -> dict[str, float]:
        rate = nbytes / seconds
        found = {"milliseconds": seconds * 1e3, "gb_per_second": rate / 1e9}
        return found | {"share_of_copy_rate": rate / copy}

    clocked = _Clocked()
    for _ in range(5):
        packed = call(clocked)
    return {
        "spec": case.spec,
        "num_kv_heads": case.num_kv_heads,
        "tokens": tokens,
        "one_call": row(statistics.median(times)),
        "in_a_row": row(statistics.median(rows)),
        "kernels_us": clocked.medians(),
        "spilled": [len(found.place) for found in packed.exceptions],
        "timeline": _timeline(call),
    }


def _seconds(call: Callable[[], object], calls: int = 1) -> float:
    """Return the seconds of one of so many calls in a row."""
    torch.cuda.synchronize()
    started = time.perf_counter()
    for _ in range(calls):
        call()
    torch.cuda.synchronize()
    return (time.perf_counter() - started) / calls


class _Clocked:
    """Runs kernels, each behind a wait of the GPU that is longer than the host's for a launch."""

    def __init__(self) -> None:
        self._events: dict[str, list[tuple[torch.cuda.Event, torch.cuda.Event]]] = defaultdict(list)

    def __call__(
        self, kernel: Kernel, shape: tuple[int, int, int], arguments: Sequence[Argument]
    ) -> None:
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda._sleep(500_000)
        begin.record()
        run_on_gpu(kernel, shape, arguments)
        end.record()
        self._events[kernel.function].append((begin, end))

    def medians(self) -> dict[str, float]:
        """Return the microseconds of each kernel."""
        torch.cuda.synchronize()
        return {
            name: statistics.median(begin.elapsed_time(end) * 1e3 for begin, end in pairs)
            for name, pairs in self._events.items()
        }


def _timeline(call: Callable[[], object], calls: int = 5) -> dict[str, object]:
    """Return of a call what the GPU did: microseconds from its first work to its last, of these at
    work, the longest waits with what came before, and the sums by name.
    """
    spans, waits, sums = [], [], defaultdict(float)
    for _ in range(calls):
        torch.cuda.synchronize()
        with profile(activities=[ProfilerActivity.CUDA]) as profiled:
            call()
            torch.cuda.synchronize()
        found = [e for e in profiled.events() if e.device_type == DeviceType.CUDA]
        found.sort(key=lambda e: e.time_range.start)
        if not found:
            return {"error": "torch's profiler sees no work of the GPU"}
        spans.append(found[-1].time_range.end - found[0].time_range.start)
        for event in found:
            sums[event.name[:40]] += event.time_range.elapsed_us() / calls
        waits.append(
            [
                (after.time_range.start - before.time_range.end, before.name[:40], after.name[:40])
                for before, after in pairwise(found)
            ]
        )
    return {
        "span_us": statistics.median(spans),
        "busy_us": sum(sums.values()),
        "waits": sorted(waits[-1], reverse=True)[:6],
        "sums_us": dict(sums),
    }


def _append_row(case: PackCase, launches: int = 32) -> dict[str, object]:
    built = moved(build_pack(case), "cuda")
    key, value = (part[:, :, 0].contiguous() for part in built.states)
    state = torch.zeros(case.batch, 8, dtype=torch.int32, device="cuda")
    turns = built.turns[:, 0].contiguous()
    growing = new_pages(built.variant, case.batch, case.num_kv_heads, 2, (1024, 1024), key.device)

    def call() -> None:
        token = key, value, turns, state
        append(token, growing, built.code, built.tables, built.variant)

    call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(launches):
            call()
    times = sorted(_events(graph.replay) / launches for _ in range(11))
    return {
        "spec": case.spec,
        "batch": case.batch,
        "num_kv_heads": case.num_kv_heads,
        "microseconds": times[5] * 1e6,
    }


def _events(call: object) -> float:
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    assert callable(call)
    call()
    end.record()
    end.synchronize()
    return float(begin.elapsed_time(end)) / 1e3


def _copy_rate() -> float:
    """Return the bytes a second, read and written, of a copy of 2 GiB on the device."""
    source = torch.randint(0, 255, (2**31,), dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.numel() / min(_events(lambda: target.copy_(source)) for _ in range(5))


if __name__ == "__main__":
    main()
