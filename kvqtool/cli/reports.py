"""Notes that several commands make about a finished run."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from kvqtool.cli.output import Output


def note_cache(report: Any, out: Output) -> None:
    """Say how large the cache is, before and after."""
    before, after = report.cache_bytes_fp16, report.cache_bytes
    bits = f"{report.effective_bits:.3g} bits a number"
    out.note(f"cache: {before:,} bytes in fp16, {after:,} bytes packed, {bits}")


def note_layers(layers: Sequence[dict[str, Any]], out: Output) -> None:
    """Name the layers that are stored otherwise than the spec says, and why."""
    reasons: dict[str, list[str]] = {}
    for layer in layers:
        if layer["kind"] == "stock cache" or layer["rope"].startswith("keys "):
            reasons.setdefault(layer["rope"], []).append(str(layer["layer"]))
    for reason, numbers in reasons.items():
        out.note(f"layers {', '.join(numbers)}: {reason}")
