r"""Join what several processes have recorded into one file.

    python benchmarks/join_results.py quality --set frontier --output whole.json part-*.json
    python benchmarks/join_results.py runs --output passkey.json kvq3.json nuq3.json

`quality` takes records of bench_quality.py of one model, text and protocol, and orders their rows
as a set does. `runs` takes what kvqtool printed with --json, under the files' names; seconds come
from NAME.seconds beside NAME.json.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

from bench_quality import SETS, machine

from kvqtool.files import atomic_output

# What rows of one table must agree on.
_COMMON = ("machine", "commit", "model", "protocol")


def main() -> None:
    """Join and write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("kind", choices=("quality", "runs"))
    parser.add_argument("parts", nargs="+", type=Path)
    parser.add_argument("--set", choices=sorted(SETS), default="frontier", help="order of rows")
    parser.add_argument("--commit", help="of `runs`")
    parser.add_argument("--output", type=Path, required=True)
    options = parser.parse_args()
    parts = {path.stem: _read(path) for path in options.parts if _is_there(path)}
    if not parts:
        raise SystemExit("error: none of the parts is there")
    if options.kind == "quality":
        whole = join_quality(list(parts.values()), SETS[options.set])
    else:
        whole = {
            "machine": machine(),
            "commit": options.commit,
            "date": time.strftime("%Y-%m-%d"),
            "runs": {
                path.stem: {"seconds": _seconds(path)} | parts[path.stem]
                for path in options.parts
                if path.stem in parts
            },
        }
    with atomic_output(options.output, force=True) as part:
        part.write_text(json.dumps(whole, indent=1) + "\n", encoding="utf-8")


def join_quality(records: list[dict[str, Any]], order: list[str]) -> dict[str, Any]:
    """Return one record with the rows of all, in an order of names; what it lacks comes last."""
    first = records[0]
    for record in records:
        for key in _COMMON:
            if record[key] != first[key]:
                raise SystemExit(f"error: parts differ in {key}: {record[key]} and {first[key]}")
    rank = {name: number for number, name in enumerate(order)}
    rows = [row for record in records for row in record["results"]]
    rows.sort(key=lambda row: rank.get(row["name"], len(rank)))
    missing = [name for name in order if name not in {row["name"] for row in rows}]
    if missing:
        print(f"missing: {', '.join(missing)}", file=sys.stderr)
    return first | {
        "command": [record["command"] for record in records],
        "calibrate_seconds": max(record["calibrate_seconds"] for record in records),
        "evaluate_seconds": max(record["evaluate_seconds"] for record in records),
        "results": rows,
    }


def _is_there(path: Path) -> bool:
    """Say which part is missing: a process that ran out of time has left none."""
    there = path.exists() and path.stat().st_size > 0
    if not there:
        print(f"missing: {path}", file=sys.stderr)
    return there


def _read(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return found


def _seconds(path: Path) -> float | None:
    beside = path.with_suffix(".seconds")
    return float(beside.read_text()) if beside.exists() else None


if __name__ == "__main__":
    main()
