"""What would still fit: the longest context, the largest batch, the smallest GPU, the best spec."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Final

from kvqtool.catalog import GPUS
from kvqtool.errors import InputError
from kvqtool.load import Load

if TYPE_CHECKING:
    from kvqtool.plan import MemoryPlan

_MOST: Final = 1 << 40
_RANKS: Final = (1, 2, 4, 8, 16, 32, 64)
_CARDS: Final = sorted((gpu for gpu in GPUS if gpu.is_card), key=lambda gpu: gpu.memory_bytes)


def largest_context(load: Load, memory: int, batch: int) -> int | None:
    """Return the most tokens of each prompt that fit: 0 if not even one does, None if all do."""
    return _largest(lambda context: load.fits(memory, context, batch))


def largest_batch(load: Load, memory: int, context: int) -> int | None:
    """Return the most sequences of a context that fit: 0 if not even one does, None if all do."""
    return _largest(lambda batch: load.fits(memory, context, batch))


def smallest_gpu(nbytes: int) -> str | None:
    """Return the smallest card of the catalog that holds so many bytes; None if none does."""
    return next((gpu.name for gpu in _CARDS if gpu.memory_bytes >= nbytes), None)


def gpus_needed(load: Load, memory: int, context: int) -> int | None:
    """Return the fewest GPUs, 1 to 64 that share each layer, on which it fits; None if none do."""
    for tp in _RANKS:
        work = replace(load.work, tp=tp, pp=1, context_parallel=1)
        shared = load if work == load.work else replace(load, work=work)
        try:
            if shared.fits(memory, context, load.work.batch):
                return tp
        except InputError:
            continue  # heads that so many GPUs cannot share
    return None


def best_spec(rows: Sequence[MemoryPlan]) -> str | None:
    """Return the spec that gives up least and still fits: the one of most bits; None if none fits.

    With several contexts, it has to fit at all of them.
    """
    misfits = {row.spec for row in rows if not row.fits}
    fitting = [row for row in rows if row.spec not in misfits]
    return max(fitting, key=lambda row: row.effective_bits).spec if fitting else None


def _largest(fits: Callable[[int], bool]) -> int | None:
    """Return the greatest number that fits, found by doubling and halving; None past `_MOST`."""
    if not fits(1):
        return 0
    good, bad = 1, 2
    while fits(bad):
        good, bad = bad, 2 * bad
        if bad > _MOST:
            return None
    while bad - good > 1:
        middle = (good + bad) // 2
        good, bad = (middle, bad) if fits(middle) else (good, middle)
    return good
