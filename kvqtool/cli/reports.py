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
    """Say what each layer is, how its keys rotate and how it is stored; equal ones share a line."""
    alike: dict[str, list[int]] = {}
    for layer in layers:
        alike.setdefault(_layer_line(layer), []).append(layer["layer"])
    for line, numbers in alike.items():
        out.note(f"layers {_runs(numbers)}: {line}")


def _layer_line(layer: dict[str, Any]) -> str:
    if layer["kind"] == "stock":
        return layer["rope"]
    window = f" {layer['window']}" if layer["window"] else ""
    axis = f" per {layer['key_axis']}" if layer["key_axis"] else ""
    key, value = (_bits(layer[f"{side}_bits"]) for side in ("key", "value"))
    return (
        f"{layer['kind']}{window}, rotation {layer['rope']}, keys {layer['key_storage']}{axis} "
        f"{key}, values {value}{_read(layer)}"
    )


def _bits(bits: float | None) -> str:
    return "bits by token" if bits is None else f"{bits:.3g} bits"


def _read(layer: dict[str, Any]) -> str:
    """Return how a layer is read and why not by the kernel; nothing where no cache was made."""
    if "read_path" not in layer:
        return ""
    reason = f" ({layer['read_reason']})" if layer["read_reason"] else ""
    return f", read: {layer['read_path']}{reason}"


def _runs(numbers: list[int]) -> str:
    """Return layer numbers in short: 0, 1, 2, 5 -> 0-2, 5."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)
