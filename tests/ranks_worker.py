"""What each of several processes runs in test_ranks.py, and one process for comparison: argv is an
output folder; what it finds is written there as `{rank}-of-{world_size}.json`.
"""

import json
import os
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from kvqtool.bundle import save_bundle
from kvqtool.calibrate import calibrate
from kvqtool.data import calibration_windows, evaluation_windows, load_text
from kvqtool.errors import InputError, KvqError
from kvqtool.histogram import LevelHistogram
from kvqtool.models import LoadedModel, load_model
from kvqtool.perplexity import evaluate
from kvqtool.quantiles import ChannelQuantiles
from kvqtool.ranks import Ranks, join_ranks, leave_ranks, read_ranks
from kvqtool.spec import parse_spec

CPU = torch.device("cpu")
SPECS = ("nuq3-1%-sink1", "nuq2-pc/int4-g64")


def sketches(ranks: Ranks) -> dict[str, Any]:
    """Merge the shares of five batches, of very different ranges, and compare with all of them."""
    generator = torch.Generator().manual_seed(0)
    batches = [torch.randn(64, 3, generator=generator) * 10.0 ** (i - 2) for i in range(5)]
    mine, everything = ChannelQuantiles(3, CPU), ChannelQuantiles(3, CPU)
    part, whole = LevelHistogram(1, 8, CPU), LevelHistogram(1, 8, CPU)
    kept = torch.ones(64, 3, dtype=torch.bool)
    for batch in batches:
        everything.update(batch)
        whole.update(batch, batch**2, kept)
    for number in ranks.share(len(batches)):
        mine.update(batches[number])
        part.update(batches[number], batches[number] ** 2, kept)
    before, merged = mine.state(), mine.merged(ranks).state()
    kept_own = all(torch.equal(before[name], mine.state()[name]) for name in before)
    part.merge(ranks)
    mass, found = (histogram.state()["sums"] for histogram in (whole, part))
    return {
        "sketch_is_exact": all(torch.equal(merged[k], v) for k, v in everything.state().items()),
        "own_sketch_is_kept": kept_own,
        "counts_are_exact": torch.equal(mass[2], found[2]),
        "histogram_error": ((mass - found).abs() / mass[[0, 0, 2, 2]].clamp_min(1e-300))
        .max()
        .item(),
    }


def failures(ranks: Ranks) -> dict[str, str]:
    """Fail in one process, in an inner block, and everywhere; return what each is told."""

    def nested(only: int | None, error: Exception) -> str:
        try:
            with ranks.together(), ranks.together():
                if only in (None, ranks.rank):
                    raise error
        except (KvqError, ZeroDivisionError) as told:
            return f"{type(told).__name__}: {told}"
        return "nothing"

    last = ranks.world_size - 1
    found = {
        "known": nested(last, InputError("a wrong text; name another")),
        "bug": nested(last, ZeroDivisionError("by zero")),
        "all": nested(None, InputError(f"rank {ranks.rank} of all")),
    }
    with ranks.together():  # and they still meet
        found["after"] = "met"
    return found


def results(loaded: LoadedModel, folder: Path) -> list[dict[str, Any]]:
    """Calibrate and evaluate; save the bundles."""
    ranks, specs = loaded.ranks, [parse_spec(spec) for spec in SPECS]
    text = load_text(None, part="calibration")
    windows = calibration_windows(text, loaded.tokenizer, samples=3, seq_len=32, seed=0)
    bundles = calibrate(loaded, windows, specs)
    for number, bundle in enumerate(bundles):
        save_bundle(bundle, folder / f"{ranks.rank}-of-{ranks.world_size}.{number}.safetensors")
    text = load_text(None, part="evaluation")
    scored = evaluation_windows(text, loaded.tokenizer, seq_len=32, windows=3, stride=16)
    found = [asdict(result) for result in evaluate(loaded, scored, bundles)]
    timed = ("seconds", "tokens_per_second")
    return [{key: value for key, value in row.items() if key not in timed} for row in found]


def run(loaded: LoadedModel, folder: Path) -> None:
    """Run everything and leave what was found."""
    ranks = loaded.ranks
    found = {
        "sketches": sketches(ranks),
        "failures": failures(ranks) if ranks.world_size > 1 else {},
        "results": results(loaded, folder),
    }
    (folder / f"{ranks.rank}-of-{ranks.world_size}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    torch.set_num_threads(1)
    model = load_model("builtin", device="cpu")
    model.ranks = read_ranks()
    join_ranks(model.ranks, on_gpu=False)
    run(model, Path(sys.argv[1]))
    leave_ranks(model.ranks)
    os._exit(0)  # threads of torch may not have ended, for which C++ would abort
