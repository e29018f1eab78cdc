r"""How many key outliers text has, over thresholds that were calibrated on other text.

    python benchmarks/count_outliers.py data/smollm2 --calibration data/wiki.train.part.tokens \
        --dataset data/wiki.test.raw --dataset data/chopin_awakening.txt

No codebook is fitted: only the first pass of calibration runs, then windows of each text, and of
the calibration text ones that calibration has not seen. The table goes to stdout; --output writes
every layer's share.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from pathlib import Path

import torch
from bench_budget import HELD_OUT, HELD_OUT_SEED
from bench_quality import commit, machine
from torch import Tensor

from kvqtool.calibrate import ground_of
from kvqtool.capture import KeyStates, Watcher, capture
from kvqtool.codebook import Codebook
from kvqtool.data import Windows, calibration_windows, evaluation_windows, load_text
from kvqtool.files import atomic_output, check_output
from kvqtool.models import LoadedModel, load_model
from kvqtool.ranges import RangeCollector
from kvqtool.spec import KvSpec, parse_spec


class _Counter(Watcher):
    """The share of a layer's keys beyond its thresholds, window by window."""

    def __init__(self, spec: KvSpec, ends: dict[int, Codebook]) -> None:
        self.spec, self.ends = spec, ends
        self.shares: dict[int, list[float]] = {layer: [] for layer in ends}

    def key(self, layer: int, states: KeyStates, gradients: KeyStates | None) -> None:
        rows, ends = states.form(True)[self.spec.sink_tokens :], self.ends[layer]
        assert ends.lower is not None
        assert ends.upper is not None
        beyond = (rows < ends.lower) | (rows > ends.upper)
        self.shares[layer].append(beyond.double().mean().item())

    def value(self, layer: int, states: Tensor, gradients: Tensor | None) -> None:
        """Ignore values: their outliers are as many in every token."""


def main() -> None:
    """Calibrate thresholds, count, print and save."""
    options = _options()
    if options.output:
        check_output(options.output, options.force)
    loaded = load_model(options.model, device=options.device, dtype="float32")
    spec = parse_spec(options.spec)
    source = load_text(options.calibration, part="calibration")
    learned, held_out = (
        calibration_windows(
            source, loaded.tokenizer, samples=samples, seq_len=options.seq_len, seed=seed
        )
        for samples, seed in ((options.samples, 0), (HELD_OUT, HELD_OUT_SEED))
    )
    ranges = RangeCollector([spec])
    _feed(loaded, learned, ranges)
    ranges.merge(loaded.ranks)
    ends = {index: ranges.ranges(spec, index) for index in ground_of(loaded, spec, 1).layers}
    texts = {"calibration text, held out": held_out} | {
        Path(name).name: evaluation_windows(
            load_text(name, part="evaluation"),
            loaded.tokenizer,
            seq_len=options.seq_len,
            windows=options.windows,
        )
        for name in options.dataset
    }
    rows = []
    print("text\tshare\tgreatest window\tleast and greatest layer")
    for name, windows in texts.items():
        counter = _Counter(spec, ends)
        _feed(loaded, windows, counter)
        by_layer = [statistics.mean(shares) for shares in counter.shares.values()]
        by_window = [statistics.mean(each) for each in zip(*counter.shares.values(), strict=True)]
        share, most = statistics.mean(by_layer), max(by_window)
        print(f"{name}\t{share:.4f}\t{most:.4f}\t{min(by_layer):.4f} {max(by_layer):.4f}")
        rows.append({"text": name, "share": share, "by_window": by_window, "by_layer": by_layer})
    if options.output:
        record = {
            "command": " ".join(["python", *sys.argv]),
            "machine": machine(),
            "commit": commit(),
            "date": time.strftime("%Y-%m-%d"),
            "spec": str(spec),
            "seq_len": options.seq_len,
            "rows": rows,
        }
        with atomic_output(options.output, force=True) as part:
            part.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


@torch.no_grad()
def _feed(loaded: LoadedModel, windows: Windows, watcher: Watcher) -> None:
    with capture(loaded.model, loaded.seam, watcher, gradients=False) as run:
        for ids in windows.ids:
            run.run(ids)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", help="builtin, a folder or a hub id")
    parser.add_argument("--spec", default="nuq3-1%-sink1")
    parser.add_argument("--calibration", help="calibration text; the built-in one by default")
    parser.add_argument("--dataset", action="append", required=True, help="repeatable")
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--seq-len", type=int, default=2048)
    parser.add_argument("--windows", type=int, default=4, help="of each text")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--force", action="store_true")
    return parser.parse_args()


if __name__ == "__main__":
    main()
