"""Memory of one long generation: the cache against the planner, the process against both.

    python benchmarks/bench_growth.py --tokens 20000 --output benchmarks/results/growth-builtin.json

`builtin` generates far past its context on purpose; the text means nothing, the bytes do. Every
1000 tokens the cache's allocated bytes are compared with the plan for that length and number of
outliers, and the process's resident memory and all that torch holds on the GPU are noted.
"""

from __future__ import annotations

import argparse
import json
import resource
import sys
import time
from pathlib import Path

import torch
from bench_quality import commit, machine

from kvqtool.attach import attach
from kvqtool.calibrate import calibrate
from kvqtool.data import calibration_windows, load_text
from kvqtool.files import atomic_output
from kvqtool.forward import next_logits
from kvqtool.layers import CacheModel
from kvqtool.memory import Outliers
from kvqtool.models import load_model
from kvqtool.spec import DEFAULT_SPEC, parse_spec


@torch.no_grad()
def main() -> None:
    """Generate, compare, print and save."""
    options = _options()
    loaded = load_model("builtin", device=options.device, dtype="float32")
    text = load_text(None, part="calibration")
    windows = calibration_windows(text, loaded.tokenizer, samples=4, seq_len=1024, seed=0)
    (bundle,) = calibrate(loaded, windows, [parse_spec(options.spec)])
    rows, started = [], time.perf_counter()
    with attach(loaded.model, bundle, seam=loaded.seam) as session:
        cache = session.new_cache(bundle, prefill="decode-exact")
        generator = torch.Generator().manual_seed(0)
        token = torch.zeros(1, 1, dtype=torch.int64, device=loaded.device)
        for count in range(1, options.tokens + 1):
            probabilities = next_logits(loaded.model, token, cache)[0].softmax(-1).cpu()
            token = torch.multinomial(probabilities, 1, generator=generator)[None]
            token = token.to(loaded.device)
            if count % options.every == 0 or count == options.tokens:
                rows.append(_row(cache, count))
                print(json.dumps(rows[-1]), file=sys.stderr)
    record = {
        "command": " ".join(["python", *sys.argv]),
        "machine": machine(),
        "commit": options.commit or commit(),
        "date": time.strftime("%Y-%m-%d"),
        "spec": options.spec,
        "seconds": time.perf_counter() - started,
        "is_equal_to_plan": all(row["cache_bytes"] == row["planned_bytes"] for row in rows),
        "rows": rows,
    }
    if options.output:
        with atomic_output(options.output, force=True) as part:
            part.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    print(json.dumps({key: record[key] for key in ("spec", "seconds", "is_equal_to_plan")}))


def _row(cache, tokens: int) -> dict[str, int]:  # type: ignore[no-untyped-def]
    outliers = [Outliers(*(body.outliers for body in store.bodies)) for store in cache.stores]
    layers = tuple(cache.seam.cache_layers.values())
    cached = CacheModel(layers, cache.bundle.spec, 1, "float32")
    return {
        "tokens": tokens,
        "cache_bytes": cache.nbytes,
        "planned_bytes": cached.bytes_given(tokens, outliers),
        "resident_bytes": resident_bytes(),
        "device_bytes": torch.cuda.memory_allocated() if torch.cuda.is_available() else 0,
    }


def resident_bytes() -> int:
    """Return the bytes of this process that are in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tokens", type=int, default=20000)
    parser.add_argument("--every", type=int, default=1000)
    parser.add_argument("--spec", default=DEFAULT_SPEC)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--commit", help="for checkouts without git")
    parser.add_argument("--output", type=Path)
    return parser.parse_args()


if __name__ == "__main__":
    main()
