"""The families of schemes that bench_qaq.py compares, and its options."""

from __future__ import annotations

import argparse
from pathlib import Path

FIXED = {
    "fixed": ("nuq4-1%-sink1", "nuq3-1%-sink1", "nuq2-1%-sink1"),
    "presets": ("kvq4", "kvq3", "kvq2"),
}
ALLOCATED = "kvq3@{:g}"
STEPWISE = ("qaq token", "qaq shadow")  # decoded token by token: for short windows, when asked for
FAMILIES = {
    "qaq": "qaq-1%",
    "qaq released": "qaq-released-1%",
    "qaq head": "qaq-head-1%",
    "qaq token": "qaq-token-1%",
    "qaq shadow": "qaq-shadow-1%",
    "qaq over nuq": "qaq-nuq-1%-sink1",
    "released over nuq": "qaq-nuq-released-1%-sink1",
    "qaq over nuq, window 64": "qaq-nuq-w64-1%-sink1",
    "qaq over kvq": "qaq-nuq-1%-sink1-pc-comp/qaq-nuq-1%-sink1-comp",
}


def options_of(description: str | None) -> argparse.Namespace:
    """Return what the command line says."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", help="builtin, a folder or a hub id")
    parser.add_argument("--calibration", help="calibration text; the built-in one by default")
    parser.add_argument(
        "--dataset",
        action="append",
        help="evaluation text; repeatable; the built-in one",
    )
    parser.add_argument("--choices", help="questions, as benchmarks/make_choices.py writes them")
    parser.add_argument(
        "--targets", default="3.3,4.3,2.75,2.33", help="effective bits, tuned first"
    )
    parser.add_argument(
        "--family", action="append", choices=sorted({*FIXED, "allocated", *FAMILIES})
    )
    parser.add_argument(
        "--ratio",
        action="append",
        default=[],
        help="FAMILY=RATIO=START: seek the keys' tolerance from START on, and no ratio; repeatable",
    )
    parser.add_argument(
        "--climb", action="append", default=[], help="FAMILY: seek its ratio too, from RATIO on"
    )
    parser.add_argument(
        "--scheme",
        action="append",
        default=[],
        help="FAMILY=SPEC: a scheme whose tolerances are known; repeatable",
    )
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--tuning-windows", type=int, default=2)
    parser.add_argument("--seq-len", type=int, default=2048)
    parser.add_argument("--windows", type=int)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--jobs", type=int, default=1, help="processes")
    parser.add_argument("--commit", help="for checkouts without git")
    parser.add_argument("--bundles", type=Path, help="an existing folder to keep bundles in")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--force", action="store_true")
    return parser.parse_args()
