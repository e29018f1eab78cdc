r"""How often the predicted loss of keys without outliers should count when bytes are spent layer by
layer: allocations with some factors on text of several kinds.

    python benchmarks/bench_bare_keys.py data/smollm2 --calibration data/wiki.train.part.tokens \
        --dataset data/wiki.test.raw --dataset data/chopin_awakening.txt --spec kvq3 --spec kvq3@4.5

All factors share statistics. The table goes to stdout; --output writes it with the layers' schemes.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from dataclasses import replace
from pathlib import Path

from bench_quality import commit, machine

from kvqtool import allocate
from kvqtool.calibrate import fit, observe
from kvqtool.data import calibration_windows, evaluation_windows, load_text
from kvqtool.files import atomic_output, check_output
from kvqtool.models import load_model
from kvqtool.perplexity import evaluate
from kvqtool.spec import parse_spec


def main() -> None:
    """Allocate with every factor, score on every text, print and save."""
    options = _options()
    if options.output:
        check_output(options.output, options.force)
    loaded = load_model(options.model, device=options.device, dtype="float32")
    learned = calibration_windows(
        load_text(options.calibration, part="calibration"),
        loaded.tokenizer,
        samples=options.samples,
        seq_len=options.seq_len,
        seed=0,
    )
    specs = [parse_spec(text) for text in options.spec or ["kvq3"]]
    fitter = observe(loaded, learned, [replace(spec, target_bits=None) for spec in specs])
    names, bundles = [], []
    for factor in options.factor or [1.0, allocate.BARE_KEYS]:
        allocate.BARE_KEYS = factor
        names += [f"{spec} x{factor:g}" for spec in specs]
        bundles += fit(loaded, learned, specs, fitter)
    rows = []
    for name in options.dataset or ["builtin"]:
        text = load_text(name, part="evaluation")
        windows = evaluation_windows(
            text, loaded.tokenizer, seq_len=options.seq_len, windows=options.windows
        )
        for scheme, result in zip(names, evaluate(loaded, windows, bundles), strict=True):
            rows.append(
                {
                    "scheme": scheme,
                    "text": name,
                    "bits": result.effective_bits,
                    "kld_mean": result.kld_mean,
                    "ppl_ratio": result.ppl_ratio,
                }
            )
            print(f"{scheme}\t{name}\t{result.effective_bits:.3f}\t{result.kld_mean:.4f}")
    if options.output:
        record = {
            "command": " ".join(["python", *sys.argv]),
            "machine": machine(),
            "commit": commit(),
            "date": time.strftime("%Y-%m-%d"),
            "layers": {
                name: {str(layer): str(spec) for layer, spec in bundle.layer_specs.items()}
                for name, bundle in zip(names, bundles, strict=True)
            },
            "rows": rows,
        }
        with atomic_output(options.output, force=True) as part:
            part.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", help="builtin, a folder or a hub id")
    parser.add_argument("--factor", type=float, action="append", help="repeatable")
    parser.add_argument("--spec", action="append", help="a mixed scheme; repeatable")
    parser.add_argument("--calibration", help="calibration text; the built-in one by default")
    parser.add_argument("--dataset", action="append", help="evaluation text; repeatable")
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--seq-len", type=int, default=2048)
    parser.add_argument("--windows", type=int, default=4, help="of each text")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--force", action="store_true")
    return parser.parse_args()


if __name__ == "__main__":
    main()
