r"""Limits on loss against other text: calibrate to a limit, then measure what the bundle costs on
text that calibration never saw, and beside it the best uniform scheme of no more bytes; and what a
real cache of as many tokens takes as bits were counted at.

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
from kvqtool.calibrate import fit
from kvqtool.data import Windows, calibration_windows, evaluation_windows, load_text
from kvqtool.files import atomic_output, check_output
from kvqtool.models import LoadedModel, load_model
from kvqtool.partial import Partial
from kvqtool.perplexity import evaluate
from kvqtool.search import observe_for, search
from kvqtool.spec import DEFAULT_SPEC, SIDES, KvSpec, parse_spec
from kvqtool.tally import PplResult

# As `kvqtool calibrate` draws them.
HELD_OUT, HELD_OUT_SEED = 4, 1_000_003
_COLUMNS = (
    "limit",
    "bits",
    "text",
    "bits_here",
    "bits_at_context",
    "held_out",
    "kld_mean",
    "ppl_ratio",
    "over_limit",
    "uniform",
    "its_bits",
)


def main() -> None:
    """Spend every budget, evaluate on every text as each is spent, print and save."""
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
    texts = {name: _text(loaded, name, options) for name in options.dataset or ["builtin"]}
    scheme = parse_spec(options.spec)
    fitter = observe_for(loaded, learned, scheme, seed=options.seed, progress=_note)
    _note("statistics", 1, 1)
    table = _Table(loaded, texts, options)
    pairs = [tuple(map(int, pair)) for pair in options.pairs.split(",")]
    uniform = [_uniform(scheme, pair) for pair in pairs]
    beside = [parse_spec(name) for name in options.beside or ()]
    bundles = fit(loaded, learned, [*uniform, *beside], fitter, seed=options.seed)
    table.score_known(bundles, len(uniform))
    with tempfile.TemporaryDirectory() as folder:
        kept = Partial(Path(folder) / "gap.safetensors", resume=True)
        for budget in _budgets(options):
            started = time.perf_counter()
            goal = scheme, budget
            found = search(loaded, (learned, held_out), goal, (fitter, kept), seed=options.seed)
            print(f"{budget}: {time.perf_counter() - started:.1f} s", file=sys.stderr)
            table.score(found)
    _print(table.rows)


class _Table:
    """What bundles cost on every text, saved as it grows."""

    def __init__(
        self, loaded: LoadedModel, texts: dict[str, Windows], options: argparse.Namespace
    ) -> None:
        self.loaded, self.texts, self.options = loaded, texts, options
        self.uniform: dict[str, list[PplResult]] = {}
        self.rows: list[dict[str, Any]] = []
        self.long = {}
        if options.at_context <= loaded.identity.max_context:
            long = {"seq_len": options.at_context, "windows": 1}
            self.long = {name: _text(loaded, name, options, **long) for name in texts}

    def score_known(self, bundles: list[Bundle], uniform: int) -> None:
        """Score the uniform schemes, which come first, and those that were named."""
        for name, windows in self.texts.items():
            results = evaluate(self.loaded, windows, bundles, progress=_note)
            self.uniform[name] = results[:uniform]
            for each in results[uniform:]:
                row = {"limit": each.spec, "text": name}
                self.rows.append(row | self._against(each, self.uniform[name]))
            self._save(bundles[0])

    def score(self, bundle: Bundle) -> None:
        """Add a row a text, and save."""
        for name, windows in self.texts.items():
            (result,) = evaluate(self.loaded, windows, [bundle], progress=_note)
            row = _promise(bundle, result) | {"text": name}
            row |= self._against(result, self.uniform[name])
            row["bits_at_context"] = self._filled(bundle, name)
            self.rows.append(row)
        self._save(bundle)

    def _filled(self, bundle: Bundle, text: str) -> float | None:
        """Return the effective bits of a cache that holds as many tokens as bits were counted at,
        or None where the model takes no such context.
        """
        if text not in self.long:
            return None
        (result,) = evaluate(self.loaded, self.long[text], [bundle])
        return result.effective_bits

    def _against(self, result: PplResult, uniform: list[PplResult]) -> dict[str, Any]:
        """Return what a bundle costs, and the best uniform scheme whose bytes are no more."""
        rivals = [each for each in uniform if each.cache_bytes <= result.cache_bytes]
        best = min(rivals, key=lambda each: each.kld_mean, default=None)
        return {
            "bits_here": result.effective_bits,
            "kld_mean": result.kld_mean,
            "ppl_ratio": result.ppl_ratio,
            "ppl_ratio_stderr": result.ppl_ratio_stderr,
            "uniform": best and best.kld_mean,
            "its_bits": best and best.effective_bits,
            "its_spec": best and best.spec,
        }

    def _save(self, bundle: Bundle) -> None:
        if self.options.output is None:
            return
        uniform = [
            {
                "text": name,
                "spec": each.spec,
                "bits_here": each.effective_bits,
                "kld_mean": each.kld_mean,
                "ppl_ratio": each.ppl_ratio,
            }
            for name, results in self.uniform.items()
            for each in results
        ]
        record = {
            "command": " ".join(["python", *sys.argv]),
            "machine": machine(),
            "commit": self.options.commit or commit(),
            "date": time.strftime("%Y-%m-%d"),
            "calibration": bundle.provenance | {"allocation": None},
            "windows": self.options.windows,
            "seq_len": self.options.seq_len,
            "at_context": self.options.at_context,
            "rows": self.rows,
            "uniform": uniform,
        }
        with atomic_output(self.options.output, force=True) as part:
            part.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


def _promise(bundle: Bundle, result: PplResult) -> dict[str, Any]:
    """Return what a budget asked, what its search measured, and what other text makes of it."""
    said = bundle.provenance["allocation"]
    (kind, limit), *_ = said["budget"].items()
    (chosen,) = (trial for trial in said["frontier"] if trial["is_chosen"])
    by_ratio = kind == "max_ppl_ratio"
    loss = result.ppl_ratio if by_ratio else result.kld_mean
    over = (loss - 1) / (limit - 1) if by_ratio else loss / limit
    return {
        "limit": f"{kind} {limit:g}",
        "bits": said["bits"],
        "held_out": chosen["ppl_ratio" if by_ratio else "kld_mean"],
        "measured": loss,
        "over_limit": None if kind == "target_bits" else over,
    }


def _text(
    loaded: LoadedModel,
    name: str,
    options: argparse.Namespace,
    *,
    seq_len: int | None = None,
    windows: int | None = None,
) -> Windows:
    """Return windows of a text, as many and as long as the options say."""
    return evaluation_windows(
        load_text(name, part="evaluation"),
        loaded.tokenizer,
        seq_len=seq_len or min(options.seq_len, loaded.identity.max_context),
        windows=windows or options.windows,
    )


def _budgets(options: argparse.Namespace) -> list[Budget]:
    at_context = options.at_context
    return [
        *(Budget(target_bits=bits, at_context=at_context) for bits in options.target_bits or ()),
        *(Budget(max_kld=limit, at_context=at_context) for limit in options.max_kld or ()),
        *(
            Budget(max_ppl_ratio=limit, at_context=at_context)
            for limit in options.max_ppl_ratio or ()
        ),
    ]


def _uniform(scheme: KvSpec, pair: tuple[int, ...]) -> KvSpec:
    """Return the scheme with widths of keys and values, uniform over layers."""
    spec = replace(scheme, mixed=False, target_bits=None)
    for side, bits in zip(SIDES, pair, strict=True):
        spec = spec.with_side(side, replace(spec.side(side), bits=bits))
    return spec


def _print(rows: list[dict[str, Any]]) -> None:
    print("\t".join(_COLUMNS))
    for row in rows:
        cells = [row.get(name) for name in _COLUMNS]
        print("\t".join(f"{cell:.4f}" if isinstance(cell, float) else str(cell) for cell in cells))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", help="builtin, a folder or a hub id")
    parser.add_argument("--spec", default=DEFAULT_SPEC)
    parser.add_argument("--beside", action="append", help="a scheme to score beside; repeatable")
    parser.add_argument(
        "--pairs",
        default="22,23,24,32,33,34,42,43,44",
        help="widths of keys and values of the uniform schemes",
    )
    parser.add_argument("--at-context", type=int, default=8192, help="tokens bits are counted at")
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
