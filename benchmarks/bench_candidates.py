r"""What else might lower the loss at the same bytes: other damping and other orders of compensated
rounding, and more text to calibrate on.

    python benchmarks/bench_candidates.py builtin --seq-len 1024 --windows 12 --output FILE
    python benchmarks/bench_candidates.py data/smollm2 --calibration data/wiki.train.part.tokens \
        --dataset data/wiki.test.raw --windows 8 --output FILE

Variants of rounding share statistics. The table goes to stdout; --output writes it.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

import torch
from bench_quality import commit, machine
from torch import Tensor

from kvqtool import compensation
from kvqtool.bundle import Bundle
from kvqtool.calibrate import fit, observe
from kvqtool.compensation import BlockFisher
from kvqtool.data import calibration_windows, evaluation_windows, load_text
from kvqtool.files import atomic_output, check_output
from kvqtool.fit import Fitter
from kvqtool.models import load_model
from kvqtool.perplexity import evaluate
from kvqtool.spec import parse_spec

SPECS = [
    *(f"nuq{bits}-1%-sink1-pc-comp/nuq{bits}-1%-sink1-comp" for bits in (4, 3, 2)),
    *(f"kvq{bits}" for bits in (4, 3, 2)),
]
DAMPINGS = (0.01, 0.2)
MORE = (2, 4)  # times the calibration windows
# Of channels, by the diagonal of H; as it is, falling.
ORDERS: dict[str, Callable[[Tensor], Tensor]] = {
    "natural order": lambda diagonal: torch.arange(diagonal.shape[1]).expand_as(diagonal),
    "rising order": lambda diagonal: diagonal.argsort(dim=1, stable=True),
}


def main() -> None:
    """Fit every variant, score all on each text, print and save."""
    options = _options()
    if options.output:
        check_output(options.output, options.force)
    loaded = load_model(options.model, device=options.device, dtype="float32")
    source = load_text(options.calibration, part="calibration")
    specs = [parse_spec(text) for text in options.spec or SPECS]
    fitted: list[tuple[str, Bundle]] = []
    for times in (1, *MORE):
        samples = times * options.samples
        learned = calibration_windows(
            source, loaded.tokenizer, samples=samples, seq_len=options.seq_len, seed=0
        )
        fitter = observe(loaded, learned, [replace(spec, target_bits=None) for spec in specs])
        name = "as it is" if times == 1 else f"{samples} windows calibrated on"
        fitted += [(name, bundle) for bundle in fit(loaded, learned, specs, fitter)]
        if times > 1:
            continue
        for damping in DAMPINGS:
            with patch.object(compensation, "DAMPING", damping):
                found = fit(loaded, learned, specs, _fresh(fitter))
            fitted += [(f"damping {100 * damping:g} %", bundle) for bundle in found]
        for name, order in ORDERS.items():
            with patch.object(BlockFisher, "_factor", _in_order(order)):
                found = fit(loaded, learned, specs, _fresh(fitter))
            fitted += [(name, bundle) for bundle in found]
    rows = []
    for text in options.dataset or ["builtin"]:
        windows = evaluation_windows(
            load_text(text, part="evaluation"),
            loaded.tokenizer,
            seq_len=options.seq_len,
            windows=options.windows,
        )
        bundles = [bundle for _, bundle in fitted]
        for (name, _), each in zip(fitted, evaluate(loaded, windows, bundles), strict=True):
            rows.append(
                {
                    "variant": name,
                    "spec": each.spec,
                    "text": text,
                    "bits": each.effective_bits,
                    "kld_mean": each.kld_mean,
                    "ppl_ratio": each.ppl_ratio,
                }
            )
            print(f"{name}\t{each.spec}\t{each.effective_bits:.3f}\t{each.kld_mean:.4f}")
    if options.output:
        record = {
            "command": " ".join(["python", *sys.argv]),
            "machine": machine(),
            "commit": options.commit or commit(),
            "date": time.strftime("%Y-%m-%d"),
            "rows": rows,
        }
        with atomic_output(options.output, force=True) as part:
            part.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


def _fresh(fitter: Fitter) -> Fitter:
    """Return a fitter of the same statistics that has fitted nothing yet."""
    return Fitter(fitter._ranges, fitter._losses)


def _in_order(
    order_of: Callable[[Tensor], Tensor],
) -> Callable[[BlockFisher], tuple[Tensor, Tensor]]:
    """Return `BlockFisher._factor` with another order of channels."""

    def factor(fisher: BlockFisher) -> tuple[Tensor, Tensor]:
        sums = fisher._sums.cpu()
        diagonal = sums.diagonal(dim1=1, dim2=2)
        order, mean = order_of(diagonal), diagonal.mean(1)
        ordered = sums.take_along_dim(order[:, :, None], 1).take_along_dim(order[:, None], 2)
        ridge = torch.where(mean > 0, compensation.DAMPING * mean, torch.ones_like(mean))
        ordered = ordered + ridge[:, None, None] * torch.eye(sums.shape[1], dtype=torch.float64)
        return torch.linalg.cholesky(torch.linalg.inv(ordered), upper=True), order

    return factor


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", help="builtin, a folder or a hub id")
    parser.add_argument("--spec", action="append", help="a compensated scheme; repeatable")
    parser.add_argument("--calibration", help="calibration text; the built-in one by default")
    parser.add_argument("--dataset", action="append", help="evaluation text; repeatable")
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--seq-len", type=int, default=2048)
    parser.add_argument("--windows", type=int, default=4, help="of each text")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--commit", help="for checkouts without git")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--force", action="store_true")
    return parser.parse_args()


if __name__ == "__main__":
    main()
