r"""What budgets, presets and all else cost on a model, in one process that shares what it can.

    python benchmarks/gpu_quality.py data/smollm2 --texts data --seconds 180 --output gpu-out

One step after another, most wanted first; each is written when it is done, and a step that would
not fit into --seconds is left out:

1. search: budgets of 2.75, 3.0 and 2.6 bits at --seq-len tokens, found by measuring, with the
   seconds of each part (statistics: also those of the paper's specs); later searches use what
   earlier ones have measured
2. budget-*: what their bundles cost on the test text and on two novels, at their true bytes
3. passkey: numbers hidden in long prompts
4. frontier: the presets and the paper's method on the test text, then all of bench_quality.py's
   frontier as far as it gets
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from bench_budget import HELD_OUT, HELD_OUT_SEED
from bench_quality import RIVALS, SETS, commit, machine, print_table, save_table

from kvqtool.allocate import options as options_of
from kvqtool.allocate import variants
from kvqtool.budget import Budget
from kvqtool.bundle import Bundle
from kvqtool.calibrate import calibrate, fit, ground_of, observe
from kvqtool.data import Windows, calibration_windows, evaluation_windows, load_text
from kvqtool.files import atomic_output
from kvqtool.fit import Fitter
from kvqtool.models import LoadedModel, load_model
from kvqtool.partial import Partial
from kvqtool.passkey import Hunt, passkey
from kvqtool.perplexity import PplResult, evaluate
from kvqtool.search import search
from kvqtool.spec import DEFAULT_SPEC, PRESETS, SIDES, KvSpec, parse_spec

TARGETS = (2.75, 3.0, 2.6)
CLAIMS = [f"nuq{bits}-1%-sink1" for bits in (4, 3, 2)]
HUNTED = ["nuq3-1%", "nuq2-1%"]
PLAIN = [*CLAIMS, *HUNTED]
BUDGETED = [f"kvq3@{bits}" for bits in ("3.0", "2.75", "2.6")]
_GROUP = 6  # schemes that are scored between two looks at the clock


class Run:
    """A model, its texts, and the clock."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.started = time.perf_counter()
        self.options = options
        self.loaded: LoadedModel = load_model(options.model, device=options.device, dtype="float32")
        self.seconds: dict[str, float] = {}
        self.learned, self.held_out = (
            self._calibration(samples, seed)
            for samples, seed in ((options.samples, 0), (HELD_OUT, HELD_OUT_SEED))
        )
        self.lap("load")

    @property
    def left(self) -> float:
        """Seconds until the limit."""
        used: float = time.perf_counter() - self.started
        return float(self.options.seconds) - used

    def lap(self, name: str) -> float:
        """Note how long a step took, from the end of the one before."""
        now = time.perf_counter() - self.started
        took = now - sum(self.seconds.values())
        self.seconds[name] = took
        print(f"{now:7.1f} s  {name}: {took:.1f} s", flush=True)
        return took

    def text(self, name: str, windows: int) -> Windows:
        """Return a text's first windows."""
        source = load_text(str(self.options.texts / name), part="evaluation")
        seq_len = self.options.seq_len
        return evaluation_windows(source, self.loaded.tokenizer, seq_len=seq_len, windows=windows)

    def record(self) -> dict[str, Any]:
        """Return what every file says of the run."""
        return {
            "command": " ".join(["python", *sys.argv]),
            "machine": machine(),
            "commit": self.options.commit or commit(),
            "date": time.strftime("%Y-%m-%d"),
            "model": self.loaded.identity.as_json(),
            "calibration": {"samples": self.options.samples, "seq_len": self.options.seq_len},
            "seconds": {name: round(took, 1) for name, took in self.seconds.items()},
        }

    def path(self, name: str) -> Path:
        """Return a file of the output."""
        output: Path = self.options.output
        return output / f"{name}{self.options.suffix}.json"

    def save(self, name: str, found: dict[str, Any]) -> None:
        """Write one file."""
        with atomic_output(self.path(name), force=True) as part:
            part.write_text(json.dumps(self.record() | found, indent=1) + "\n", encoding="utf-8")

    def score(
        self, name: str, windows: Windows, bundles: Sequence[Bundle], names: Sequence[str]
    ) -> list[PplResult]:
        """Score bundles on a text, print and save."""
        results = evaluate(self.loaded, windows, bundles)
        self.lap(name)
        save_table(self.path(name), self.record(), list(zip(names, results, strict=True)))
        print_table(results)
        return results

    def _calibration(self, samples: int, seed: int) -> Windows:
        source = load_text(str(self.options.texts / self.options.calibration), part="calibration")
        return calibration_windows(
            source,
            self.loaded.tokenizer,
            samples=samples,
            seq_len=self.options.seq_len,
            seed=seed,
        )


def main() -> None:
    """Do all steps."""
    options = _options()
    options.output.mkdir(parents=True, exist_ok=True)
    run = Run(options)
    fitter, found = search_budgets(run)
    names = [f"--target-bits {bits}" for bits in found]
    test = run.text(options.test, options.windows)
    run.score("quality-budget-2048", test, list(found.values()), names)
    for novel in options.novel:
        windows = run.text(novel, options.novel_windows)
        run.score(f"quality-budget-{Path(novel).stem}", windows, list(found.values()), names)
    wanted = [parse_spec(name) for name in (*PRESETS, *PLAIN)]
    presets = fit(run.loaded, run.learned, wanted, fitter)
    run.lap("fit presets")
    by_name = dict(zip((*PRESETS, *PLAIN), presets, strict=True))
    hunt(run, {name: by_name[name] for name in (*HUNTED, "kvq3", "kvq2")})
    frontier(run, test, fitter, {name: by_name[name] for name in (*CLAIMS, *PRESETS)})


def search_budgets(run: Run) -> tuple[Fitter, dict[float, Bundle]]:
    """Find a bundle for each of TARGETS, and say what every part took."""
    scheme, texts = parse_spec(DEFAULT_SPEC), (run.learned, run.held_out)
    mixed = replace(scheme, mixed=True, target_bits=None)
    fitter = observe(run.loaded, run.learned, [mixed, *map(parse_spec, PLAIN)])
    run.lap("statistics")
    forms = variants(scheme)
    options_of(ground_of(run.loaded, forms[0], 1), fitter, run.learned.ids.numel())
    run.lap("predictions")
    layers = [layer.index for layer in run.loaded.seam.packed]
    for form in forms:
        for width in (2, 3, 4):
            fitter.books(dict.fromkeys(layers, _at_width(form, width)))
    run.lap("fits")
    found, told = {}, {}
    with tempfile.TemporaryDirectory() as folder:
        kept = Partial(Path(folder) / "search.safetensors", resume=True)
        for bits in TARGETS:
            goal = scheme, Budget(target_bits=bits, at_context=run.options.seq_len)
            found[bits] = search(run.loaded, texts, goal, (fitter, kept))
            allocation = found[bits].provenance["allocation"]
            told[str(bits)] = {
                "seconds": round(run.lap(f"search {bits}"), 1),
                "bits": allocation["bits"],
                "measured_schemes": len(allocation["frontier"]),
                "layers": {str(at): str(spec) for at, spec in found[bits].layer_specs.items()},
                "allocation": allocation,
            }
            run.save("search", {"targets": told})
    return fitter, found


def _at_width(form: KvSpec, width: int) -> KvSpec:
    for side in SIDES:
        form = form.with_side(side, replace(form.side(side), bits=width))
    return form


def hunt(run: Run, bundles: dict[str, Bundle]) -> None:
    """Ask for hidden numbers with each bundle."""
    text = load_text(str(run.options.texts / run.options.test), part="evaluation")
    asked = Hunt(tuple(int(n) for n in run.options.lengths.split(",")), run.options.trials)
    run.loaded.read_path = "materialise"
    found = {}
    for name, bundle in bundles.items():
        found[name] = asdict(passkey(run.loaded, text, bundle, asked))
        del found[name]["layers"]
        run.lap(f"passkey {name}")
        for row in found[name]["lengths"]:
            print(f"{row['tokens']}: {row['found']} of {row['trials']}, {row['found_baseline']}")
        run.save("passkey", {"runs": found})


def frontier(run: Run, test: Windows, fitter: Fitter, known: dict[str, Bundle]) -> None:
    """Score presets and the paper's method, then the rest of the frontier as time allows."""
    name = "quality-frontier-2048"
    results = run.score(name, test, list(known.values()), list(known))
    names, took = list(known), run.seconds[name] / len(known)
    rest = [each for each in SETS["frontier"] if each not in known and each not in BUDGETED]
    # Twice what the statistics of the search took, for they have more forms of keys and values.
    if run.left < 2 * run.seconds["statistics"] + _GROUP * took:
        print(f"no time left for {len(rest)} schemes")
        return
    budgeted = fit(run.loaded, run.learned, list(map(parse_spec, BUDGETED)), fitter)
    others = calibrate(run.loaded, run.learned, list(map(parse_spec, rest)))
    bundles = dict(zip((*BUDGETED, *rest), (*budgeted, *others), strict=True))
    run.lap("calibrate the frontier")
    # 3 bits first: where time ends, whole families are compared at that width.
    waiting = sorted(bundles, key=lambda each: ("3" not in each.split("-")[0], each in RIVALS))
    while waiting and run.left > 1.3 * _GROUP * took:
        group, waiting = waiting[:_GROUP], waiting[_GROUP:]
        found = evaluate(run.loaded, test, [bundles[each] for each in group])
        took = run.lap(f"frontier {len(names)}") / len(group)
        results, names = results + found, names + group
        order = {each: number for number, each in enumerate(SETS["frontier"])}
        rows = sorted(zip(names, results, strict=True), key=lambda row: order[row[0]])
        save_table(run.path(name), run.record(), rows)
        print_table(found)
    if waiting:
        print(f"no time left for {', '.join(waiting)}")


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", help="builtin, a folder or a hub id")
    parser.add_argument("--texts", type=Path, required=True, help="folder of the texts")
    parser.add_argument("--calibration", default="wiki.train.part.tokens")
    parser.add_argument("--test", default="wiki.test.raw")
    parser.add_argument("--novel", action="append", help="a text of another kind; repeatable")
    parser.add_argument("--seconds", type=float, default=600.0, help="limit of the whole run")
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--seq-len", type=int, default=2048)
    parser.add_argument("--windows", type=int, default=24)
    parser.add_argument("--novel-windows", type=int, default=8)
    parser.add_argument("--lengths", default="2048,4096,8192", help="of passkey prompts")
    parser.add_argument("--trials", type=int, default=6)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--commit", help="for checkouts without git")
    parser.add_argument("--output", type=Path, required=True, help="folder of the records")
    parser.add_argument("--suffix", default="", help="of their names, such as -h200")
    options = parser.parse_args()
    options.novel = options.novel or ["chopin_awakening.txt", "falkner_moonfleet.txt"]
    return options


if __name__ == "__main__":
    main()
