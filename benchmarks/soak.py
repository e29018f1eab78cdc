"""Decode very many tokens from a CUDA graph: memory does not grow, tokens are those of eager steps.

    python benchmarks/soak.py --steps 100000 --output benchmarks/results/soak-builtin-h200.json

`builtin` generates far past its context on purpose, sampled, so that states keep changing; the text
means nothing, the bytes and the time do. Every `--every` steps these are noted: the cache's own
bytes; what was asked of torch beside them and beside the weights, before it rounds up to blocks
(graph inputs, workspaces and tables: `beside_bytes`); what its allocator holds from the GPU without
using it, apart for the graphs' private pool and for the common one. The common pool keeps the
buffers that the cache has outgrown until something fits there, so it follows the cache; the graphs'
pool holds one step's activations.

The same steps are then taken one by one for `--eager` steps: the tokens have to be the same. Both
parts end at their time limits; how many steps there were is in the JSON, which is written after
each part.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from contextlib import closing
from pathlib import Path
from typing import Any, Final

import torch
from bench_growth import resident_bytes
from bench_quality import commit, machine

from kvqtool.attach import attached
from kvqtool.bundle import Bundle
from kvqtool.cache import KvqCache
from kvqtool.calibrate import calibrate
from kvqtool.data import calibration_windows, load_text
from kvqtool.decode import Decoder
from kvqtool.files import atomic_output
from kvqtool.forward import next_logits
from kvqtool.memory import PAGE_TOKENS
from kvqtool.models import LoadedModel, load_model
from kvqtool.sampling import Sampling
from kvqtool.spec import parse_spec

PROMPT: Final = 100  # tokens
# A page's tables grow by 4 bytes a layer; the least that could leak at a page is 512.
FLAT_BYTES_PER_STEP: Final = 1.0
# A step of a page's boundary stands out from the others of its page by this factor.
STANDS_OUT: Final = 1.5


class Soak:
    """One generation: its tokens, the time of each, and the memory now and then."""

    def __init__(self, loaded: LoadedModel, bundle: Bundle, options: argparse.Namespace) -> None:
        """Keep what all runs share."""
        self._loaded = loaded
        self._bundle = bundle
        self._options = options
        self._on_gpu = loaded.device.type == "cuda"
        self._weights = _requested_bytes() if self._on_gpu else 0

    @torch.no_grad()
    def run(self, mode: str, steps: int, limit: float) -> dict[str, Any]:
        """Generate until `steps` tokens are there or `limit` seconds are over."""
        options, tokens, seconds = self._options, [], []
        rows: list[dict[str, Any]] = []
        sampling = Sampling(options.steps, temperature=1.0, seed=options.seed)
        with attached(self._loaded, self._bundle) as session:
            cache = session.new_cache(self._bundle)
            prompt = _prompt(self._loaded)
            decoder = Decoder(self._loaded.model, cache, sampling, mode)
            with closing(decoder.tokens(next_logits(self._loaded.model, prompt, cache))) as stream:
                started = before = time.perf_counter()
                for (token,) in stream:
                    tokens.append(token)
                    now = time.perf_counter()
                    seconds.append(now - before)
                    if len(tokens) % options.every == 0:
                        rows.append(self._row(cache, len(tokens), now - started))
                    before = time.perf_counter()
                    if len(tokens) == steps or before - started > limit:
                        break
        return {
            **decoder.report.as_json(),
            "steps": len(tokens),
            "tokens_per_second": len(tokens) / sum(seconds),
            "time": _time(seconds),
            "rows": rows,
            "tokens": tokens,
        }

    def _row(self, cache: KvqCache, steps: int, passed: float) -> dict[str, Any]:
        """Note the memory; not part of any step's time."""
        row = {
            "steps": steps,
            "seconds": round(passed, 3),
            "cache_bytes": cache.nbytes,
            "resident_bytes": resident_bytes(),
        }
        if self._on_gpu:
            row["beside_bytes"] = _requested_bytes() - self._weights - cache.nbytes
            row["reserved_bytes"] = torch.cuda.memory_reserved()
            row |= _unused_by_pool()
        print(json.dumps(row), file=sys.stderr, flush=True)
        return row


def main() -> None:
    """Run both parts, save after each, print what they say."""
    options = _options()
    dtype = options.dtype or ("float16" if options.device.startswith("cuda") else "float32")
    loaded = load_model("builtin", device=options.device, dtype=dtype)
    text = load_text(None, part="calibration")
    windows = calibration_windows(text, loaded.tokenizer, samples=4, seq_len=256, seed=0)
    (bundle,) = calibrate(loaded, windows, [parse_spec(options.spec)])
    record: dict[str, Any] = {
        "command": " ".join(["python", *sys.argv]),
        "machine": machine(),
        "commit": options.commit or commit(),
        "date": time.strftime("%Y-%m-%d"),
        "spec": options.spec,
        "dtype": dtype,
        "asked_steps": options.steps,
    }
    soak = Soak(loaded, bundle, options)
    found = soak.run("auto", options.steps, options.seconds)
    tokens = found.pop("tokens")
    record["soak"] = found | _growth(found["rows"])
    _save(record, options.output)
    count = min(options.eager, len(tokens))
    eager = soak.run("eager", count, options.eager_seconds)
    eager.pop("rows")
    taken = eager.pop("tokens")
    pairs = enumerate(zip(taken, tokens, strict=False))
    eager["first_difference"] = next((i for i, (a, b) in pairs if a != b), None)
    record["eager"] = eager
    _save(record, options.output)
    short = {key: value for key, value in record["soak"].items() if key != "rows"}
    print(json.dumps(record | {"soak": short}, indent=1))


def _prompt(loaded: LoadedModel) -> torch.Tensor:
    text = load_text(None, part="evaluation").text[: 40 * PROMPT]
    ids = loaded.tokenizer(text, verbose=False)["input_ids"][:PROMPT]
    return torch.tensor([ids], device=loaded.device)


def _time(seconds: list[float]) -> dict[str, float]:
    """Return an ordinary step's time and what page boundaries take of all: steps are told apart by
    their place in a page, averaged over all pages.
    """
    pages = [
        seconds[i : i + PAGE_TOKENS] for i in range(0, len(seconds) - PAGE_TOKENS + 1, PAGE_TOKENS)
    ]
    if not pages:
        return {"step_seconds": statistics.median(seconds)}
    by_place = [statistics.fmean(page[i] for page in pages) for i in range(PAGE_TOKENS)]
    step = statistics.median(by_place)
    further = sum(mean - step for mean in by_place if mean > STANDS_OUT * step)
    return {
        "step_seconds": step,
        "page_seconds": further,
        "page_share": further / sum(by_place),
        "longest_step_seconds": max(seconds),
    }


def _growth(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Return by how much memory beside the cache has grown from the first row to the last, and how
    far rows lie apart.
    """
    if len(rows) < 2 or "beside_bytes" not in rows[0]:
        return {}
    beside = [row["beside_bytes"] for row in rows]
    grown, steps = beside[-1] - beside[0], rows[-1]["steps"] - rows[0]["steps"]
    return {
        "beside_grown_bytes": grown,
        "beside_spread_bytes": max(beside) - min(beside),
        "is_flat": grown <= FLAT_BYTES_PER_STEP * steps,
        "reserved_over_cache": rows[-1]["reserved_bytes"] / rows[-1]["cache_bytes"],
    }


def _requested_bytes() -> int:
    """Return the bytes of all tensors. What is allocated for them is more: whole blocks, of which
    up to 1 MiB a tensor may be nobody's.
    """
    return int(torch.cuda.memory_stats()["requested_bytes.all.current"])


def _unused_by_pool() -> dict[str, int]:
    """Return what torch's allocator holds and does not use, for graphs and in common."""
    graph = common = 0
    for segment in torch.cuda.memory_snapshot():
        unused = segment["total_size"] - segment["allocated_size"]
        if tuple(segment.get("segment_pool_id", (0, 0))) == (0, 0):
            common += unused
        else:
            graph += unused
    return {"graph_pool_unused_bytes": graph, "common_pool_unused_bytes": common}


def _save(record: dict[str, Any], path: Path | None) -> None:
    if path is not None:
        with atomic_output(path, force=True) as part:
            part.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=100_000)
    parser.add_argument("--every", type=int, default=5_000)
    parser.add_argument("--eager", type=int, default=1_000, help="steps taken one by one as well")
    parser.add_argument("--seconds", type=float, default=600.0, help="limit of the long run")
    parser.add_argument("--eager-seconds", type=float, default=60.0, help="limit of the eager run")
    parser.add_argument("--spec", default="nuq3-1%-sink1")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--dtype", help="float16 on a GPU, float32 on a CPU")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--commit", help="for checkouts without git")
    parser.add_argument("--output", type=Path)
    return parser.parse_args()


if __name__ == "__main__":
    main()
