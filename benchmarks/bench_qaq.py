r"""QAQ at equal true bytes: bits per token alone and over KVQuant's codebooks, beside fixed bits.

    python benchmarks/bench_qaq.py builtin --seq-len 512 --windows 4 --output qaq.json
    python benchmarks/bench_qaq.py data/smollm2 --calibration wiki.train.part.tokens \
        --dataset wiki.test.raw --choices choices.jsonl --windows 40 --output qaq.json
    python benchmarks/bench_qaq.py builtin --decode 2000

A family of schemes has two tolerances. For each target their scale is sought until effective bits,
all buffers counted, are the target's on windows of the calibration text; their ratio is the one of
least divergence there, chosen at the first target. Evaluation text is not
looked at before the table. --decode times decoding instead.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from bench_quality import commit, machine

from kvqtool.attach import attach
from kvqtool.bundle import Bundle
from kvqtool.calibrate import calibrate
from kvqtool.choices import choose
from kvqtool.data import Windows, calibration_windows, evaluation_windows, load_text
from kvqtool.files import atomic_output, check_output
from kvqtool.forward import next_logits
from kvqtool.models import LoadedModel, load_model
from kvqtool.perplexity import PplResult, evaluate
from kvqtool.spec import parse_spec

FIXED = {4.3: "nuq4-1%-sink1", 3.3: "nuq3-1%-sink1", 2.33: "nuq2-1%-sink1"}
ALLOCATED = "kvq3@{:g}"
FAMILIES = {
    "qaq": "qaq-1%",
    "qaq released": "qaq-released-1%",
    "qaq head": "qaq-head-1%",
    "qaq over nuq": "qaq-nuq-1%-sink1",
    "released over nuq": "qaq-nuq-released-1%-sink1",
    "qaq over nuq, window 64": "qaq-nuq-w64-1%-sink1",
    "qaq over kvq": "qaq-nuq-1%-sink1-pc-comp/qaq-nuq-1%-sink1-comp",
}
RATIOS = (
    0.3,
    1.0,
    3.0,
    10.0,
    30.0,
    100.0,
    300.0,
    1000.0,
    3000.0,
)  # of the values' tolerance to the keys'
_STEPS = 10
_CLOSE = 0.01  # of the target's bits
_COLUMNS = ("scheme", "bits", "ratio", "kld", "same top", "choices", "spec")


@dataclass
class Tuner:
    """Finds a family's tolerances on windows of the calibration text."""

    loaded: LoadedModel
    windows: Windows

    def measure(self, bundle: Bundle) -> PplResult:
        """Score the tuning windows."""
        return evaluate(self.loaded, self.windows, [bundle], allow_calibration_text=True)[0]

    def reach(
        self, bundle: Bundle, ratio: float, target: float, start: float
    ) -> tuple[Bundle, PplResult, float]:
        """Return the bundle whose tolerances, at a ratio, cost the target's bits, its score, and
        the keys' tolerance, sought from `start` on.
        """
        scale, low, high = start, 0.0, float("inf")  # low: too many bits
        for _ in range(_STEPS):
            found = with_budgets(bundle, scale, scale * ratio)
            score, at = self.measure(found), scale
            over = score.effective_bits - target
            if abs(over) < _CLOSE * target:
                break
            low, high = (scale, high) if over > 0 else (low, scale)
            scale *= 2**over  # a doubled tolerance takes a bit
            if not low < scale < high:
                scale = (low * high) ** 0.5
        return found, score, at

    def best_ratio(self, bundle: Bundle, target: float) -> tuple[float, float]:
        """Return the ratio of least divergence at the target, climbing from the middle of RATIOS,
        and the keys' tolerance there.
        """
        scores: dict[int, tuple[float, float]] = {}

        def cost(index: int) -> float:
            if index not in scores:
                start = min(scores.values())[1] if scores else 0.03
                _, score, scale = self.reach(bundle, RATIOS[index], target, start)
                bits, is_there = score.effective_bits, abs(score.effective_bits / target - 1) < 0.03
                note(f"ratio {RATIOS[index]:g}: {bits:.3f} bits, KLD {score.kld_mean:.4f}")
                scores[index] = score.kld_mean if is_there else float("inf"), scale
            return scores[index][0]

        at = len(RATIOS) // 2
        while True:
            around = [i for i in (at, at - 1, at + 1) if 0 <= i < len(RATIOS)]
            best = min(around, key=cost)
            if best == at:
                return RATIOS[at], scores[at][1]
            at = best


def with_budgets(bundle: Bundle, key: float, value: float) -> Bundle:
    """Return a bundle with other tolerances; its codebooks do not depend on them."""
    key, value = float(f"{key:.3g}"), float(f"{value:.3g}")
    spec = bundle.spec
    return replace(
        bundle,
        spec=replace(
            spec,
            key=replace(spec.key, error_budget=key),
            value=replace(spec.value, error_budget=value),
        ),
    )


def main() -> None:
    """Calibrate, tune, evaluate, print and save; or time decoding."""
    options = _options()
    if options.output:
        check_output(options.output, options.force)
    loaded = load_model(options.model, device=options.device, dtype=options.dtype)
    source = load_text(options.calibration, part="calibration")
    seq_len = min(options.seq_len, loaded.identity.max_context)
    learned = calibration_windows(
        source, loaded.tokenizer, samples=options.samples, seq_len=seq_len, seed=options.seed
    )
    if options.decode:
        record = {"decode": _decode(loaded, learned, options.decode)}
    else:
        record = _table(options, loaded, learned)
    whole = {
        "command": " ".join(["python", *sys.argv]),
        "machine": machine(),
        "commit": options.commit or commit(),
        "date": time.strftime("%Y-%m-%d"),
    }
    if options.output:
        with atomic_output(options.output, force=options.force) as part:
            part.write_text(json.dumps(whole | record, indent=1) + "\n", encoding="utf-8")


def _table(options: argparse.Namespace, loaded: LoadedModel, learned: Windows) -> dict[str, object]:
    """Return, and print, the figures of every family at every target."""
    targets = [float(each) for each in options.targets.split(",")]
    families = {name: FAMILIES[name] for name in options.family or FAMILIES}
    fixed = {t: FIXED[t] for t in targets if t in FIXED}
    rest = [*fixed.values(), *(ALLOCATED.format(t) for t in targets)]
    specs = [parse_spec(text) for text in (*rest, *families.values())]
    bundles = calibrate(loaded, learned, specs, seed=options.seed, progress=_progress)
    chosen = [("fixed" if not b.spec.mixed else "allocated", b) for b in bundles[: len(rest)]]
    some = slice(0, options.tuning_windows)
    tuner = Tuner(
        loaded, replace(learned, ids=learned.ids[some], scored_from=learned.scored_from[some])
    )
    for name, bundle in zip(families, bundles[len(rest) :], strict=True):
        note(f"tuning {name}")
        ratio, start = tuner.best_ratio(bundle, targets[0])
        for target in targets:
            found, score, scale = tuner.reach(bundle, ratio, target, start)
            if abs(score.effective_bits / target - 1) > 0.05:
                note(f"{name} has no {target:g} bits: {score.effective_bits:.3f} are nearest")
                continue
            chosen.append((name, found))
            start = scale
    text = load_text(options.dataset, part="evaluation")
    windows = evaluation_windows(
        text,
        loaded.tokenizer,
        seq_len=learned.ids.shape[1],
        windows=options.windows,
        stride=None,
    )
    results = []
    for name, bundle in chosen:
        note(f"evaluating {bundle.spec}")
        (result,) = evaluate(loaded, windows, [bundle])
        answers = choose(loaded, options.choices, bundle) if options.choices else None
        results.append(
            {"family": name}
            | {k: v for k, v in asdict(result).items() if k not in ("protocol", "layers")}
            | {"choices": asdict(answers) | {"layers": None} if answers else None}
        )
    results.sort(key=lambda row: -row["effective_bits"])
    _print_table(results)
    return {"targets": targets, "protocol": result.protocol, "results": results}


def _print_table(results: list[dict[str, object]]) -> None:
    print("\t".join(_COLUMNS))
    for row in results:
        answers = row["choices"]
        change = "-"
        if isinstance(answers, dict):
            low, high = answers["accuracy_change_low"], answers["accuracy_change_high"]
            change = f"{answers['accuracy']:.3f} ({low:+.3f} to {high:+.3f})"
        figures = f"{row['effective_bits']:.3f}\t{row['ppl_ratio']:.4f}\t{row['kld_mean']:.4f}"
        print(f"{row['family']}\t{figures}\t{row['same_top1']:.4f}\t{change}\t{row['spec']}")


def _decode(loaded: LoadedModel, learned: Windows, tokens: int) -> list[dict[str, object]]:
    """Time decoding with each cache, and note its bytes at every quarter."""
    rows = []
    for text in ("nuq3-1%-sink1", "qaq-k0.3-v0.3-1%-released", "qaq-nuq-k0.3-v1-1%-sink1"):
        (bundle,) = calibrate(loaded, learned, [parse_spec(text)])
        row = _timed(loaded, bundle, tokens) | {"spec": str(bundle.spec)}
        rows.append(row)
        print("\t".join(str(row[name]) for name in ("spec", "seconds", "seconds_by_quarter")))
    print(f"slowest over fixed bits: {max(r['seconds'] for r in rows) / rows[0]['seconds']:.2f}")
    return rows


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


def note(text: str) -> None:
    """Say something on stderr."""
    print(f"{time.strftime('%H:%M:%S')} {text}", file=sys.stderr)


def _progress(phase: str, done: int, total: int) -> None:
    if done in (0, total):
        note(f"{phase} {done}/{total}")


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", help="builtin, a folder or a hub id")
    parser.add_argument("--calibration", help="calibration text; the built-in one by default")
    parser.add_argument("--dataset", help="evaluation text; the built-in one by default")
    parser.add_argument("--choices", help="questions, as benchmarks/make_choices.py writes them")
    parser.add_argument(
        "--targets", default="3.3,4.3,2.75,2.33", help="effective bits, tuned first"
    )
    parser.add_argument("--family", action="append", choices=sorted(FAMILIES), help="repeatable")
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--tuning-windows", type=int, default=2)
    parser.add_argument("--seq-len", type=int, default=2048)
    parser.add_argument("--windows", type=int)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--commit", help="for checkouts without git")
    parser.add_argument("--decode", type=int, help="time decoding so many tokens instead")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--force", action="store_true")
    return parser.parse_args()


if __name__ == "__main__":
    main()
