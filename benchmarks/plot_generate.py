"""Draw tokens a second and peak memory of generation against context.

python benchmarks/plot_generate.py benchmarks/results/generate-h200.json docs/generation.svg

Of what several records say of the same way and context, the last one's is drawn.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any, Final

from matplotlib import pyplot

NAMES: Final = {
    "dynamic": "DynamicCache, sdpa",
    "static": "StaticCache, compiled",
    "quantized": "QuantizedCache, HQQ 4 bits",
    "eager": "kvqtool, step by step",
    "graph": "kvqtool, from a graph",
}
PANELS: Final = {
    "tokens_per_second": ("tokens a second, batch 1", 1),
    "prompt_peak_bytes": ("peak of reading the prompt, GiB", 2**30),
    "peak_bytes": ("peak while decoding, GiB", 2**30),
}


def main() -> None:
    """Draw a panel for speed and two for memory."""
    # Text as text, and the same file from the same rows.
    pyplot.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "kvqtool"})
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("records", type=Path, nargs="+")
    parser.add_argument("output", type=Path)
    options = parser.parse_args()
    records = [json.loads(path.read_text(encoding="utf-8")) for path in options.records]
    spec = records[0]["spec"]
    points = merged(records, spec)
    figure, panels = pyplot.subplots(1, 3, figsize=(14, 3.8))
    for panel, (key, (label, unit)) in zip(panels, PANELS.items(), strict=True):
        draw(panel, points, key, unit)
        panel.set_ylabel(label)
    panels[1].legend()
    commits = ", ".join(dict.fromkeys(record["commit"] for record in records))
    last = records[-1]
    title = f"{last['shape']}, {spec}, {last['machine']}, commits {commits}, {last['date']}"
    figure.suptitle(title, fontsize=10)
    figure.tight_layout()
    figure.savefig(options.output, metadata={"Date": None})


def merged(records: list[dict[str, Any]], spec: str) -> dict[tuple[str, int], dict[str, Any]]:
    """Return what was measured, by way and context: of stock's caches and of one scheme."""
    found: dict[tuple[str, int], dict[str, Any]] = {}
    for record in records:
        for row in record["rows"]:
            if row.get("spec", spec) != spec or row["batch"] > 1:
                continue
            drawn = {key: row[key] for key in PANELS if key in row}
            if record["filled"]:
                drawn.pop("prompt_peak_bytes", None)
            found.setdefault((row["way"], row["context_tokens"]), {}).update(drawn)
    return found


def draw(panel: Any, points: dict[tuple[str, int], dict[str, Any]], key: str, unit: float) -> None:
    """Draw one figure of every way against context."""
    for way, name in NAMES.items():
        line = {
            at: row[key] / unit
            for (w, at), row in sorted(points.items())
            if w == way and key in row
        }
        if line:
            panel.plot(list(line), list(line.values()), marker="o", label=name)
    panel.set_xscale("log", base=2)
    panel.set_ylim(bottom=0)
    panel.set_xlabel("context, tokens")


if __name__ == "__main__":
    main()
