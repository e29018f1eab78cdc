r"""Limits on loss against other text: calibrate to a limit, then measure what the bundle costs on
text that calibration never saw, and beside it the best uniform scheme of no more bytes.

    python benchmarks/bench_budget.py builtin --max-kld 0.02 --max-kld 0.05 \
        --dataset builtin --dataset data/wiki.valid.tokens --output gap.json

All limits share statistics and measurements. The table goes to stdout, everything else to stderr.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from bench_quality import commit, machine

from kvqtool.budget import Budget
from kvqtool.bundle import Bundle
from kvqtool.calibrate import calibrate
from kvqtool.data import Windows, calibration_windows, evaluation_windows, load_text
from kvqtool.files import atomic_output, check_output
from kvqtool.models import LoadedModel, load_model
from kvqtool.partial import Partial
from kvqtool.perplexity import evaluate
from kvqtool.search import spend
from kvqtool.spec import DEFAULT_SPEC, parse_spec

# As `kvqtool calibrate` draws them.
HELD_OUT, HELD_OUT_SEED = 4, 1_000_003
_COLUMNS = ("limit", "bits", "text", "held_out", "measured", "over_limit", "uniform", "its_bits")


def main() -> None:
    """Spend every budget, evaluate on every text, print and save."""
    options = _options()
    if options.output:
        check_output(options.output, options.force)
    loaded = load_model(options.model, device=options.device, dtype="float32")
    source = load_text(options.calibration, part="calibration")
    seq_len = min(options.seq_len, loaded.identity.max_context)
    learned, held_out = (
        calibration_windows(source, loaded.tokenizer, samples=samples, seq_len=seq_len, seed=seed)
        for samples, seed in (
            (options.samples, options.seed),
            (HELD_OUT, options.seed + HELD_OUT_SEED),
        )
    )
    texts = {
        name: evaluation_windows(
            load_text(name, part="evaluation"),
            loaded.tokenizer,
            seq_len=seq_len,
            windows=options.windows,
        )
        for name in options.dataset or ["builtin"]
    }
    bundles = _uniform(loaded, learned, options)
    with tempfile.TemporaryDirectory() as folder:
        kept = Partial(Path(folder) / "gap.safetensors", resume=True)
        for budget in _budgets(options):
            started = time.perf_counter()
            goal = parse_spec(options.spec), budget
            bundles.append(
                spend(
                    loaded,
                    (learned, held_out),
                    goal,
                    seed=options.seed,
                    progress=_note,
                    partial=kept,
                )
            )
            print(f"{budget}: {time.perf_counter() - started:.1f} s", file=sys.stderr)
    rows = [row for text in texts.items() for row in _rows(loaded, text, bundles)]
    _print(rows)
    if options.output:
        record = {
            "command": " ".join(["python", *sys.argv]),
            "machine": machine(),
            "commit": options.commit or commit(),
            "date": time.strftime("%Y-%m-%d"),
            "calibration": bundles[-1].provenance | {"allocation": None},
            "windows": options.windows,
            "seq_len": seq_len,
            "rows": rows,
        }
        with atomic_output(options.output, force=True) as part:
            part.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


def _budgets(options: argparse.Namespace) -> list[Budget]:
    return [
        *(Budget(target_bits=bits) for bits in options.target_bits or ()),
        *(Budget(max_kld=limit) for limit in options.max_kld or ()),
        *(Budget(max_ppl_ratio=limit) for limit in options.max_ppl_ratio or ()),
    ]


def _uniform(loaded: LoadedModel, learned: Windows, options: argparse.Namespace) -> list[Bundle]:
    """Return bundles of the scheme with every pair of widths, uniform over layers."""
    scheme = replace(parse_spec(options.spec), mixed=False, target_bits=None)
    specs = [
        scheme.with_side("key", replace(scheme.key, bits=keys)).with_side(
            "value", replace(scheme.value, bits=values)
        )
        for keys in (2, 3, 4)
        for values in (2, 3, 4)
    ]
    return calibrate(loaded, learned, specs, seed=options.seed, progress=_note)


def _rows(
    loaded: LoadedModel, text: tuple[str, Windows], bundles: list[Bundle]
) -> list[dict[str, Any]]:
    """Return a row per budget: what its bundle costs on one text, and the best uniform scheme whose
    bytes there are no more.
    """
    name, windows = text
    results = evaluate(loaded, windows, bundles, progress=_note)
    uniform = [r for b, r in zip(bundles, results, strict=True) if not b.layer_specs]
    rows = []
    for bundle, result in zip(bundles, results, strict=True):
        said = bundle.provenance.get("allocation")
        if said is None:
            continue
        (kind, limit), *_ = said["budget"].items()
        (chosen,) = (trial for trial in said["frontier"] if trial["is_chosen"])
        by_ratio = kind == "max_ppl_ratio"
        loss = result.ppl_ratio if by_ratio else result.kld_mean
        over = (loss - 1) / (limit - 1) if by_ratio else loss / limit
        rivals = [each for each in uniform if each.cache_bytes <= result.cache_bytes]
        best = min(rivals, key=lambda each: each.kld_mean, default=None)
        rows.append(
            {
                "limit": f"{kind} {limit:g}",
                "text": name,
                "bits": said["bits"],
                "bits_here": result.effective_bits,
                "held_out": chosen["ppl_ratio" if by_ratio else "kld_mean"],
                "measured": loss,
                "over_limit": None if kind == "target_bits" else over,
                "kld_mean": result.kld_mean,
                "ppl_ratio": result.ppl_ratio,
                "ppl_ratio_stderr": result.ppl_ratio_stderr,
                "uniform": best and best.kld_mean,
                "its_bits": best and best.effective_bits,
                "its_spec": best and best.spec,
            }
        )
    return rows


def _print(rows: list[dict[str, Any]]) -> None:
    print("\t".join(_COLUMNS))
    for row in rows:
        cells = [row[name] for name in _COLUMNS]
        print("\t".join(f"{cell:.4f}" if isinstance(cell, float) else str(cell) for cell in cells))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", help="builtin, a folder or a hub id")
    parser.add_argument("--spec", default=DEFAULT_SPEC)
    parser.add_argument("--target-bits", type=float, action="append", help="repeatable")
    parser.add_argument("--max-kld", type=float, action="append", help="repeatable")
    parser.add_argument("--max-ppl-ratio", type=float, action="append", help="repeatable")
    parser.add_argument("--calibration", help="calibration text; the built-in one by default")
    parser.add_argument("--dataset", action="append", help="evaluation text; repeatable")
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--seed", type=int, default=0, help="of the calibration windows")
    parser.add_argument("--seq-len", type=int, default=2048)
    parser.add_argument("--windows", type=int, help="of each evaluation text; all by default")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--commit", help="for checkouts without git")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--force", action="store_true")
    return parser.parse_args()


def _note(phase: str, done: int, total: int) -> None:
    if done in (0, total) or done % 8 == 0:
        print(f"{time.strftime('%H:%M:%S')} {phase} {done}/{total}", file=sys.stderr)


if __name__ == "__main__":
    main()
