"""Time and memory of packing a prompt's states into a layer's cache, by kernels and by torch.

    python benchmarks/bench_prompt.py --output benchmarks/results/prompt-h200.json

One layer's keys and values of 32,768 tokens, with outlier channels, go into a store as the first
call of a model brings them. `kernels` is what a cache read from pages does, `torch` the same store
without kernels, `rows` the store of `--read-path materialise`. `peak` is what was allocated
above the states themselves at the highest point, `held` what stays. The states' own size, which is
what transformers' cache copies, stands beside them. Codes of all ways are compared bit for bit.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
from bench_quality import commit, machine
from torch import Tensor

from kvqtool.live import watch
from kvqtool.memory import LayerGeometry
from kvqtool.open_page import OpenPage
from kvqtool.page_writer import PageWriter
from kvqtool.paged import PagedStore
from kvqtool.read_path import page_form
from kvqtool.reader import PageReader, SharedTables
from kvqtool.rope import AngleFormula, Rotation
from kvqtool.seam import LayerSeam
from kvqtool.spec import parse_spec
from kvqtool.store import LayerStore
from kvqtool.synthetic import synthetic_bundle

sys.path.append(str(Path(__file__).parents[1] / "tests"))
from packing_case import with_feedback

HEAD_DIM = 128
SPECS = ("nuq3-1%", "nuq3-1%-sink1-pc-comp/nuq3-1%-sink1-comp")  # the second is kvq3


class Layer:
    """A layer of so many KV heads, and what makes stores of it."""

    def __init__(self, spec: str, heads: int, device: str) -> None:
        self.spec, self.device = parse_spec(spec), torch.device(device)
        geometry = LayerGeometry(heads, HEAD_DIM, HEAD_DIM)
        half = torch.arange(HEAD_DIM // 2) / (HEAD_DIM // 2)
        self.formula = AngleFormula(500_000.0**-half, 1.0, torch.float16)
        rotation = Rotation("half", HEAD_DIM, 0, 1, "halves")
        self.seam = LayerSeam(0, geometry, None, True, rotation, self.formula, "")
        random = torch.Generator().manual_seed(0)
        self.spread = torch.randn(heads * HEAD_DIM, generator=random).exp()
        bundle = synthetic_bundle(self.spec, {0: geometry}, {0: self.spread})
        key, value = bundle.codebooks_of(0)
        self.books = (
            with_feedback(key, self.spec.key, heads, HEAD_DIM),
            with_feedback(value, self.spec.value, heads, HEAD_DIM),
        )
        self.form = page_form(self.seam, self.spec)

    def states(self, tokens: int) -> tuple[Tensor, Tensor]:
        """Return keys and values, (1, heads, tokens, 128) float16."""
        heads = self.seam.geometry.num_kv_heads
        random = torch.Generator(self.device).manual_seed(1)
        shape = 1, heads, tokens, HEAD_DIM
        key, value = (
            torch.randn(shape, device=self.device, generator=random).half() for _ in range(2)
        )
        return key * self.spread.view(1, heads, 1, HEAD_DIM).to(key), value

    def angles(self, start: int, stop: int) -> tuple[Tensor, Tensor]:
        """Return cosines and sines of tokens."""
        cos, sin = self.formula.tables(torch.arange(start, stop, device=self.device)[:, None])
        return cos.float(), sin.float()

    def store(self, way: str) -> LayerStore:
        """Return an empty store: `kernels`, `torch` or `rows`."""
        if way == "rows":
            return LayerStore(self.spec, self.books, self.seam)
        reader = PageReader(self.seam, self.spec, self.books, self.form, SharedTables())
        writer = PageWriter(self.spec, self.books, reader)
        opened = OpenPage(writer) if way == "kernels" else None
        return PagedStore(self.spec, self.books, self.seam, self.form, opened)


def measure(layer: Layer, way: str, states: tuple[Tensor, Tensor], rounds: int) -> dict[str, Any]:
    """Pack `rounds` times and return the median time, the peak, and what stays."""
    times, peak, store = [], 0, layer.store(way)
    for _ in range(rounds):
        store = layer.store(way)
        _wait(layer.device)
        with watch(layer.device) as live:
            started = time.perf_counter()
            store.append(*states, layer.angles)
            _wait(layer.device)
            times.append(time.perf_counter() - started)
        peak = live.peak_bytes
    held = sum(t.nbytes for group in store.tensors.values() for t in group)
    canonical = store.canonical()
    return {
        "way": way,
        "milliseconds": statistics.median(times[1:] or times) * 1e3,
        "first_milliseconds": times[0] * 1e3,
        "peak_bytes": peak,
        "held_bytes": held,
        "canonical": canonical,
    }


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def main() -> None:
    """Measure, compare, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--spec", action="append")
    parser.add_argument("--heads", type=int, action="append")
    parser.add_argument("--tokens", type=int, default=32768)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--torch-rounds", type=int, default=2)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--commit")
    options = parser.parse_args()
    rows = []
    print("spec  heads  way  ms  peak MiB  held MiB  states MiB  same codes")
    for spec in options.spec or SPECS:
        for heads in options.heads or [8, 32]:
            layer = Layer(spec, heads, options.device)
            states = layer.states(options.tokens)
            nbytes, reference = sum(part.nbytes for part in states), None
            for way in ("rows", "torch", "kernels"):
                rounds = options.rounds if way == "kernels" else options.torch_rounds
                row = measure(layer, way, states, rounds)
                found = row.pop("canonical")
                reference = reference or found
                same = all(torch.equal(found[name], reference[name]) for name in reference)
                row |= {"spec": spec, "heads": heads, "tokens": options.tokens}
                rows.append(row | {"states_bytes": nbytes, "same_codes": same})
                sizes = [row["peak_bytes"], row["held_bytes"], nbytes]
                shown = "  ".join(f"{size / 2**20:.1f}" for size in sizes)
                print(
                    f"{spec}  {heads}  {way}  {row['milliseconds']:.2f}  {shown}  {same}",
                    flush=True,
                )
    record = {"machine": machine(), "commit": options.commit or commit(), "rows": rows}
    record["date"] = time.strftime("%Y-%m-%d")
    if options.output:
        options.output.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
