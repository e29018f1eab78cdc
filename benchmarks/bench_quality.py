r"""Quality against true bytes: one table of many schemes on one model and text, sharing calibration
and baseline.

    python benchmarks/bench_quality.py builtin --set demo
    python benchmarks/bench_quality.py data/smollm2 \
        --calibration wiki.train.part.tokens --dataset wiki.test.raw \
        --windows 40 --set ladder --output benchmarks/results/quality-wikitext2-2048.json

The table goes to stdout, everything else to stderr; --output writes every figure with machine,
commit and command.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import torch

from kvqtool.bundle import Bundle, load_bundle, save_bundle
from kvqtool.calibrate import calibrate, describe_run
from kvqtool.data import Windows, calibration_windows, evaluation_windows, load_text
from kvqtool.files import atomic_output, check_output
from kvqtool.models import LoadedModel, load_model
from kvqtool.perplexity import PplResult, evaluate
from kvqtool.spec import PRESETS, KvSpec, parse_spec

_WIDTHS = (4, 3, 2)
_NUQ = [f"nuq{b}-1%-sink1" for b in _WIDTHS]
SETS: dict[str, list[str]] = {
    "demo": ["fp", *PRESETS, *_NUQ, "int4-sink1", "int3-sink1"],
    "main": [
        *_NUQ,
        *(f"{spec}-pc" for spec in _NUQ),
        *(f"{spec}-qnorm" for spec in _NUQ),
        "int4-sink1",
        "int3-sink1",
    ],
    "presets": [
        *_NUQ,
        *(f"nuq{b}-1%-sink1-pc-comp/nuq{b}-1%-sink1-comp" for b in _WIDTHS),
        *(f"nuq{b}-1%-sink1-pc-comp/nuq{b}-sink1-comp-vrot" for b in _WIDTHS),
        *PRESETS,
    ],
    "ladder": [
        "fp",
        "int8-sink1",
        *_NUQ,
        *(f"{spec}-pc" for spec in _NUQ),
        *(f"nuq{b}-sink1" for b in _WIDTHS),
        *(f"nuq{b}-1%" for b in _WIDTHS),
        *(f"{spec}-nofisher" for spec in _NUQ),
        *(f"{spec}-fisher" for spec in _NUQ),
        *(f"{spec}-qnorm" for spec in _NUQ),
        *(f"{spec}-postrope" for spec in _NUQ),
        *(f"{spec}-pertoken" for spec in _NUQ),
        *(f"int{b}-sink1" for b in _WIDTHS),
        *(f"int{b}-1%-sink1" for b in _WIDTHS),
        *(f"nf{b}-sink1" for b in _WIDTHS),
        *(f"int{b}-g64-sink1" for b in _WIDTHS),
        *(f"int{b}-g32-sink1" for b in _WIDTHS),
        *(f"int{b}-sink1-postrope-pertoken" for b in _WIDTHS),
        "nuq4-1%-sink1/nuq3-1%-sink1",
        "nuq3-1%-sink1/nuq4-1%-sink1",
        "nuq3-1%-sink1/nuq2-1%-sink1",
        "nuq2-1%-sink1/nuq3-1%-sink1",
        "nuq3-1%-cap2-sink1",
        "nuq2-1%-sink1-r128",
    ],
}
# The codecs others use, each at the grouping that its authors name or that suits heads of 64.
RIVALS = [
    *(f"int{b}-sink1" for b in _WIDTHS),
    *(f"int{b}-1%-sink1" for b in _WIDTHS),
    *(f"nf{b}-sink1" for b in _WIDTHS),
    *(f"int{b}-g64-sink1" for b in _WIDTHS),
    *(f"kivi{b}-g32" for b in _WIDTHS),
    *(f"kivi{b}-g64" for b in _WIDTHS),
    "kivi2-g32-r128",
    *(f"had{b}-g64" for b in _WIDTHS),
    *(f"had{b}-g64-postrope" for b in _WIDTHS),
    *(f"tq{b}-g64" for b in _WIDTHS),
]
SETS["rivals"] = RIVALS
SETS["frontier"] = [
    *SETS["presets"],
    *(f"{spec}-pc" for spec in _NUQ),
    *(f"{spec}-comp" for spec in _NUQ),
    *(f"{spec}-qnorm" for spec in _NUQ),
    *(f"nuq{b}-sink1" for b in _WIDTHS),
    *(f"kvq3@{bits}" for bits in ("3.0", "2.75", "2.6")),
    *RIVALS,
]
SETS["claims"] = [*_NUQ, *PRESETS, *(f"kvq3@{bits}" for bits in ("3.0", "2.75", "2.6"))]
# Schemes that share one run of the baseline; results are saved group by group.
_GROUP = 6
_COLUMNS = {
    "spec": "{}",
    "effective_bits": "{:.3f}",
    "ppl": "{:.3f}",
    "ppl_ratio": "{:.4f}",
    "ppl_ratio_stderr": "{:.4f}",
    "kld_mean": "{:.4f}",
    "kld_p999": "{:.2f}",
    "same_top1": "{:.3f}",
    "cache_bytes": "{}",
    "cache_bytes_fp16": "{}",
}


def main() -> None:
    """Calibrate all schemes in one go, evaluate them against one baseline, print and save."""
    options = _options()
    if options.output:
        check_output(options.output, options.force)
    loaded = load_model(options.model, device=options.device, dtype=options.dtype)
    wanted = options.spec or ([] if options.bundle else SETS[options.set])
    specs = [parse_spec(text) for text in wanted]
    started, used = time.perf_counter(), time.process_time()
    source = load_text(options.calibration, part="calibration")
    seq_len = min(options.calibration_seq_len, loaded.identity.max_context)
    learned = calibration_windows(
        source, loaded.tokenizer, samples=options.samples, seq_len=seq_len, seed=options.seed
    )
    bundles = _bundles(options, loaded, learned, specs) if specs else []
    bundles += [load_bundle(path) for path in options.bundle or ()]
    calibrated, used_then = time.perf_counter(), time.process_time()
    text = load_text(options.dataset, part="evaluation")
    windows = evaluation_windows(
        text, loaded.tokenizer, seq_len=options.seq_len, windows=options.windows, stride=None
    )
    record = {
        "command": " ".join(["python", *sys.argv]),
        "machine": machine(),
        "commit": options.commit or commit(),
        "date": time.strftime("%Y-%m-%d"),
        "model": loaded.identity.as_json()
        | {"parameters": sum(p.numel() for p in loaded.model.parameters())},
        "calibration": next((b.provenance for b in bundles if b.spec.needs_calibration), None),
        "calibrate_seconds": calibrated - started,
        "calibrate_cpu_seconds": used_then - used,
    }
    results: list[PplResult] = []
    for start in range(0, len(bundles), _GROUP):
        group = bundles[start : start + _GROUP]
        results += evaluate(loaded, windows, group, protocol=options.protocol, progress=_note)
        record["evaluate_seconds"] = time.perf_counter() - calibrated
        record["evaluate_cpu_seconds"] = time.process_time() - used_then
        if options.output:
            names = [*wanted, *(path.name for path in options.bundle or ())]
            save_table(options.output, record, list(zip(names, results, strict=False)))
    print_table(results)


def save_table(
    path: Path, record: dict[str, object], results: Sequence[tuple[str, PplResult]]
) -> None:
    """Write what there is so far, so that a run that is cut short leaves its finished groups."""
    whole = record | {
        "protocol": results[0][1].protocol,
        "results": [{"name": name} | _row(result) for name, result in results],
    }
    with atomic_output(path, force=True) as part:
        part.write_text(json.dumps(whole, indent=1) + "\n", encoding="utf-8")


def _bundles(
    options: argparse.Namespace, loaded: LoadedModel, learned: Windows, specs: list[KvSpec]
) -> list[Bundle]:
    """Calibrate, or take bundles that an earlier run left in --bundles."""
    if options.bundles is None:
        return calibrate(loaded, learned, specs, seed=options.seed, progress=_note)
    paths = [options.bundles / f"{str(spec).replace('/', '_')}.safetensors" for spec in specs]
    if not all(path.exists() for path in paths):
        options.bundles.mkdir(parents=True, exist_ok=True)
        made = calibrate(loaded, learned, specs, seed=options.seed, progress=_note)
        for bundle, path in zip(made, paths, strict=True):
            save_bundle(bundle, path, force=True)
    bundles = [load_bundle(path) for path in paths]
    wanted = describe_run(loaded, learned, options.seed)
    for bundle in bundles:
        for key in ("dataset_sha256", "samples", "seq_len", "seed"):
            if bundle.provenance[key] != wanted[key]:
                raise SystemExit(f"error: {options.bundles} holds bundles of another {key}")
    return bundles


def machine() -> str:
    """Say in words what this runs on."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return f"{platform.machine()}, {torch.get_num_threads()} threads"


def commit() -> str | None:
    """Return the checkout's commit, or None outside one."""
    answer = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parent,
        check=False,
    )
    return answer.stdout.strip() or None


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", help="builtin, a folder or a hub id")
    parser.add_argument("--calibration", help="calibration text; the built-in one by default")
    parser.add_argument("--dataset", help="evaluation text; the built-in one by default")
    parser.add_argument("--set", choices=sorted(SETS), default="demo", help="which schemes")
    parser.add_argument("--spec", action="append", help="a scheme instead of a set; repeatable")
    parser.add_argument("--bundle", action="append", type=Path, help="a file beside; repeatable")
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--seed", type=int, default=0, help="of the calibration windows")
    parser.add_argument("--calibration-seq-len", type=int, default=2048)
    parser.add_argument("--seq-len", type=int, default=2048)
    parser.add_argument("--windows", type=int)
    parser.add_argument("--protocol", default="decode-exact")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--commit", help="for checkouts without git")
    parser.add_argument(
        "--bundles", type=Path, help="folder to keep bundles in, or to take them from"
    )
    parser.add_argument("--output", type=Path)
    parser.add_argument("--force", action="store_true")
    return parser.parse_args()


def print_table(results: Sequence[PplResult]) -> None:
    """Print what was found, a row a scheme."""
    print(f"baseline perplexity {results[0].ppl_baseline:.4f}")
    rows = [list(_COLUMNS)] + [
        [
            form.format(value) if (value := getattr(result, name)) is not None else "-"
            for name, form in _COLUMNS.items()
        ]
        for result in results
    ]
    widths = [max(len(row[i]) for row in rows) for i in range(len(_COLUMNS))]
    for row in rows:
        print(
            "  ".join(
                cell.rjust(width) if i else cell.ljust(width)
                for i, (cell, width) in enumerate(zip(row, widths, strict=True))
            )
        )


def _row(result: PplResult) -> dict[str, object]:
    row = asdict(result)
    del row["protocol"], row["layers"]
    return row


def _note(phase: str, done: int, total: int) -> None:
    if done in (0, total) or done % 8 == 0:
        print(f"{time.strftime('%H:%M:%S')} {phase} {done}/{total}", file=sys.stderr)


if __name__ == "__main__":
    main()
