"""Move a dataclass of tensors to another device."""

from __future__ import annotations

from dataclasses import fields, is_dataclass, replace
from typing import Any, TypeVar

from torch import Tensor

Value = TypeVar("Value")


def moved(value: Value, device: str) -> Value:
    """Return a tensor, or a tuple or dataclass that holds some, on a device."""
    return _moved(value, device)  # type: ignore[no-any-return]  # of the type it had


def _moved(value: Any, device: str) -> Any:
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, tuple):
        return tuple(_moved(part, device) for part in value)
    if is_dataclass(value) and not isinstance(value, type):
        parts = {f.name: getattr(value, f.name) for f in fields(value)}
        return replace(value, **{name: _moved(part, device) for name, part in parts.items()})
    return value
