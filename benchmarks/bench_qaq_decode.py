"""Time decoding with bits per token against fixed bits, and note the cache's bytes.

    python benchmarks/bench_qaq_decode.py builtin --tokens 2000 --output decode.json

Both calibrate first, on little text: what is timed does not depend on how good codebooks are.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

import torch
from bench_quality import commit, machine

from kvqtool.attach import attach
from kvqtool.bundle import Bundle
from kvqtool.calibrate import calibrate
from kvqtool.data import calibration_windows, load_text
from kvqtool.files import atomic_output, check_output
from kvqtool.forward import next_logits
from kvqtool.models import LoadedModel, load_model
from kvqtool.spec import parse_spec

SPECS = ("nuq3-1%-sink1", "qaq-k0.3-v0.3-1%-released", "qaq-nuq-k0.3-v1-1%-sink1")


def main() -> None:
    """Calibrate, decode, print and save."""
    options = _options()
    if options.output:
        check_output(options.output, options.force)
    loaded = load_model(options.model, device=options.device, dtype=options.dtype)
    source = load_text(options.calibration, part="calibration")
    learned = calibration_windows(
        source, loaded.tokenizer, samples=options.samples, seq_len=options.seq_len, seed=0
    )
    rows = []
    for bundle in calibrate(loaded, learned, [parse_spec(text) for text in SPECS]):
        row = _timed(loaded, bundle, options.tokens) | {"spec": str(bundle.spec)}
        rows.append(row)
        print("\t".join(str(row[name]) for name in ("spec", "seconds", "seconds_by_quarter")))
    print(f"slowest over fixed bits: {max(r['seconds'] for r in rows) / rows[0]['seconds']:.2f}")
    record = {
        "command": " ".join(["python", *sys.argv]),
        "machine": machine(),
        "commit": options.commit or commit(),
        "date": time.strftime("%Y-%m-%d"),
        "decode": rows,
    }
    if options.output:
        with atomic_output(options.output, force=options.force) as part:
            part.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


@torch.no_grad()
def _timed(loaded: LoadedModel, bundle: Bundle, tokens: int) -> dict[str, object]:
    seconds, nbytes = [], []
    with attach(loaded.model, bundle, seam=loaded.seam) as session:
        cache = session.new_cache(bundle)
        token = torch.tensor([[1]], device=loaded.device)
        for _ in range(4):
            started = time.perf_counter()
            for _ in range(tokens // 4):
                token = next_logits(loaded.model, token, cache).argmax(-1)[:, None]
            seconds.append(round(time.perf_counter() - started, 2))
            nbytes.append(cache.nbytes)
    return {
        "tokens": tokens,
        "seconds": sum(seconds),
        "seconds_by_quarter": seconds,
        "bytes_by_quarter": nbytes,
    }


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", help="builtin, a folder or a hub id")
    parser.add_argument("--calibration", help="calibration text; the built-in one by default")
    parser.add_argument("--tokens", type=int, default=2000)
    parser.add_argument("--samples", type=int, default=2)
    parser.add_argument("--seq-len", type=int, default=256)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--commit", help="for checkouts without git")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--force", action="store_true")
    return parser.parse_args()


if __name__ == "__main__":
    main()
