"""Notes that several commands make about a finished run."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

from kvqtool.cli.output import Output, Table

_COLUMNS: Final = ("layers", "kind", "rotation", "keys", "values", "read", "why")


def note_cache(report: Any, out: Output) -> None:
    """Say how large the cache is, before and after."""
    before, after = report.cache_bytes_fp16, report.cache_bytes
    bits = f"{report.effective_bits:.3g} bits a number"
    out.note(f"cache: {before:,} bytes in fp16, {after:,} bytes packed, {bits}")


def note_layers(layers: Sequence[dict[str, Any]], out: Output) -> None:
    """Say what each layer is, how its keys rotate, how it is stored and read; equal ones share a
    row. Of layers that keep their stock cache it says why.
    """
    alike: dict[tuple[str, ...], list[int]] = {}
    for layer in layers:
        alike.setdefault(_layer_row(layer), []).append(layer["layer"])
    rows = [(_runs(numbers), *row) for row, numbers in alike.items()]
    shown = [at for at, _ in enumerate(_COLUMNS) if any(row[at] for row in rows)]
    columns = tuple(_COLUMNS[at] for at in shown)
    out.note_table(Table(columns, [[row[at] for at in shown] for row in rows]))


def _layer_row(layer: dict[str, Any]) -> tuple[str, ...]:
    if layer["kind"] == "stock":
        return layer["kind"], "", "", "", "", layer["rope"]
    window = f" {layer['window']}" if layer["window"] else ""
    axis = f" per {layer['key_axis']}" if layer["key_axis"] else ""
    key, value = (_bits(layer[f"{side}_bits"]) for side in ("key", "value"))
    keys = f"{layer['key_storage']}{axis}, {key}"
    read, reason = layer.get("read_path") or "", layer.get("read_reason") or ""
    return f"{layer['kind']}{window}", layer["rope"], keys, value, read, reason


def _bits(bits: float | None) -> str:
    return "bits by token" if bits is None else f"{bits:.3g} bits"


def _runs(numbers: list[int]) -> str:
    """Return layer numbers in short: 0, 1, 2, 5 -> 0-2, 5."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)
