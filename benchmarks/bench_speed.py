"""What the commands cost in time and memory on this machine.

    python benchmarks/bench_speed.py builtin
    python benchmarks/bench_speed.py data/smollm2 --calibration wiki.train.part.tokens --dataset
    wiki.test.raw --windows 4

Start-up of the command line, calibration of one spec, and `ppl` decode-exact against the two plain
forwards it holds. One JSON object on stdout.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
from bench_quality import commit, machine

from kvqtool.bundle import save_bundle
from kvqtool.calibrate import calibrate
from kvqtool.data import calibration_windows, evaluation_windows, load_text
from kvqtool.models import load_model
from kvqtool.perplexity import evaluate
from kvqtool.spec import DEFAULT_SPEC, parse_spec


def main() -> None:
    """Measure and print."""
    options = _options()
    record: dict[str, object] = {
        "command": " ".join(["python", *sys.argv]),
        "machine": machine(),
        "commit": options.commit or commit(),
        "date": time.strftime("%Y-%m-%d"),
        "help_seconds": _command_seconds("--help"),
        "memory_plan_seconds": _command_seconds("memory-plan", "builtin"),
    }
    loaded = load_model(options.model, device=options.device, dtype="float32")
    weights = sum(p.numel() * p.element_size() for p in loaded.model.parameters())
    specs = [parse_spec(text) for text in options.spec or [DEFAULT_SPEC]]
    text = load_text(options.calibration, part="calibration")
    learned = calibration_windows(
        text, loaded.tokenizer, samples=options.samples, seq_len=2048, seed=options.seed
    )
    before = _resident()
    digests = []
    for _ in range(options.repeats):
        started = time.perf_counter()
        bundle, *others = calibrate(loaded, learned, specs, seed=options.seed)
        record["calibrate_seconds"] = time.perf_counter() - started
        parts = sorted(bundle.tensors().items())
        digests.append(
            hashlib.sha256(b"".join(t.numpy().tobytes() for _, t in parts)).hexdigest()[:16]
        )
    record |= {
        "weights_bytes": weights,
        "calibrate_peak_bytes": _peak() - before,
        "calibrate_repeats": options.repeats,
        "calibrate_is_deterministic": len(set(digests)) == 1,
    }
    if options.keep:
        options.keep.mkdir(parents=True, exist_ok=True)
        for each in (bundle, *others):
            save_bundle(each, options.keep / f"{each.spec}.safetensors", force=True)
    text = load_text(options.dataset, part="evaluation")
    windows = evaluation_windows(
        text, loaded.tokenizer, seq_len=2048, windows=options.windows, stride=None
    )
    started = time.perf_counter()
    evaluate(loaded, windows, [bundle])
    record["ppl_seconds"] = time.perf_counter() - started
    record["ppl_windows"] = len(windows.ids)
    record["ppl_over_two_forwards"] = record["ppl_seconds"] / (
        2 * _forward_seconds(loaded, windows.ids)
    )
    print(json.dumps(record, indent=1))


def _command_seconds(*arguments: str) -> float:
    """Median wall time of a command, as a process."""
    runs = []
    for _ in range(7):
        started = time.perf_counter()
        subprocess.run(
            [sys.executable, "-m", "kvqtool", *arguments], check=True, capture_output=True
        )
        runs.append(time.perf_counter() - started)
    return statistics.median(runs)


@torch.no_grad()
def _forward_seconds(loaded, ids):  # type: ignore[no-untyped-def]
    """Seconds of one plain forward over all windows, logits included."""
    started = time.perf_counter()
    for window in ids:
        logits = loaded.model(window[None].to(loaded.device), use_cache=False).logits
    logits.sum().item()
    return time.perf_counter() - started


def _resident() -> int:
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def _peak() -> int:
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", help="builtin, a folder or a hub id")
    parser.add_argument("--calibration")
    parser.add_argument("--dataset")
    parser.add_argument("--spec", action="append", help="repeatable; the first is evaluated")
    parser.add_argument("--seed", type=int, default=0, help="of the calibration windows")
    parser.add_argument("--keep", type=Path, help="folder to leave the bundles in")
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--windows", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--commit", help="for checkouts without git")
    return parser.parse_args()


if __name__ == "__main__":
    main()
