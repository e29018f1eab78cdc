"""Amounts of memory as people write them; GiB is 2**30 and GB is 10**9."""

from __future__ import annotations

import re
from typing import Final

from kvqtool.errors import InputError

_UNITS: Final = {
    "": 1,
    "B": 1,
    **{f"{letter}iB": 1024 ** (power + 1) for power, letter in enumerate("KMGT")},
    **{f"{letter}B": 1000 ** (power + 1) for power, letter in enumerate("KMGT")},
}


def parse_bytes(text: str) -> int:
    """Parse an amount of memory: `80GiB`, `80GB`, `81559MiB`, `1.5GiB` or a plain number of bytes.

    GiB is 2**30 and GB is 10**9; `80G` says neither and is refused.

    Raises:
        InputError: when the text is not a positive amount in a known unit.
    """
    match = re.fullmatch(r"(\d{1,24})(?:\.(\d{1,24}))?\s*([A-Za-z]*)", text.strip())
    units = {unit.lower(): size for unit, size in _UNITS.items()}
    if match is None or match[3].lower() not in units:
        raise InputError(
            f"{text!r} is not an amount of memory; write 80GiB (2**30) or 80GB (10**9)"
        )
    whole, fraction, unit = match[1], match[2] or "", match[3].lower()
    amount: int = int(whole + fraction) * units[unit] // 10 ** len(fraction)
    if amount < 1:
        raise InputError(f"{text!r} is no memory at all; give what the GPU has, as in 80GiB")
    return amount


def in_gib(nbytes: float) -> str:
    """Return an amount for people to read: `12.3 GiB`."""
    return f"{nbytes / 2**30:,.2f} GiB"
