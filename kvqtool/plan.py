"""How many bytes a model's cache takes under a spec, and whether they fit: arithmetic, no torch."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Final

from kvqtool.errors import InputError
from kvqtool.memory import (
    PAGE_TOKENS,
    Outliers,
    exact_bytes,
    expected_outliers,
    layer_buffers,
    most_outliers,
    paper_bytes,
    planned_bytes,
    position_buffer,
    split_tokens,
)
from kvqtool.shape import ModelShape
from kvqtool.spec import KvSpec

DTYPES: Final = ("float16", "bfloat16", "float32")
_UNITS: Final = {
    "": 1,
    "B": 1,
    **{f"{letter}iB": 1024 ** (power + 1) for power, letter in enumerate("KMGT")},
    **{f"{letter}B": 1000 ** (power + 1) for power, letter in enumerate("KMGT")},
}


@dataclass(frozen=True)
class MemoryPlan:
    """What one spec costs at one context and batch.

    Args:
        spec: the scheme.
        context: tokens of each sequence.
        batch: sequences.
        dtype: what weights, sinks, window and `fp` caches are held in.
        bytes_per_token: what one more token of a sequence adds, averaged over the next page.
        cache_bytes: the cache as allocated, with the outliers that calibration leads to expect.
        cache_bytes_bound: the same if all key elements were outliers (or all tokens at their cap);
            never exceeded.
        cache_bytes_fp16: the same tokens in 16-bit floats.
        paper_bytes: KVQuant's own accounting, which is not what is allocated.
        effective_bits: `cache_bytes` as bits per cached number.
        compression: `cache_bytes_fp16 / cache_bytes`.
        weights_bytes: the model's weights; None when no weights lie beside the config.
        total_bytes: weights (where known) and `cache_bytes`.
        gpu_memory_bytes: the memory to fit in; None when it was not given.
        fits: whether `total_bytes` is within `gpu_memory_bytes`; None without the latter.
        largest_context: most tokens per sequence that still fit; None without a GPU memory.
        max_context: the context the model was made for; None when its config does not say.
        breakdown: bytes of `cache_bytes` by kind of buffer, all layers together.
        assumptions: what the numbers rest on, in sentences.
    """

    spec: str
    context: int
    batch: int
    dtype: str
    bytes_per_token: float
    cache_bytes: int
    cache_bytes_bound: int
    cache_bytes_fp16: int
    paper_bytes: float
    effective_bits: float
    compression: float
    weights_bytes: int | None
    total_bytes: int
    gpu_memory_bytes: int | None
    fits: bool | None
    largest_context: int | None
    max_context: int | None
    breakdown: dict[str, int]
    assumptions: list[str]


@dataclass(frozen=True)
class _Load:
    """A model's cache under one spec, batch and dtype; the context is still free."""

    shape: ModelShape
    spec: KvSpec
    batch: int
    dtype: str

    def outliers(self, context: int, *, bound: bool) -> list[Outliers]:
        """Return each layer's outliers at a context, as expected or at most."""
        rows = split_tokens(self.spec, context)[1] * self.batch
        count = most_outliers if bound else expected_outliers
        return [count(self.spec, layer, rows) for layer in self.shape.layers]

    def cache_bytes(self, context: int, *, bound: bool = False) -> int:
        """Return the bytes allocated at a context."""
        counts = self.outliers(context, bound=bound)
        layers = self.shape.layers
        return planned_bytes(self.spec, layers, self.batch, context, counts, self.dtype)

    def breakdown(self, context: int) -> dict[str, int]:
        """Return the bytes by kind of buffer (`key.words`, `sink.value`), all layers together."""
        sums: dict[str, int] = {}
        counts = self.outliers(context, bound=False)
        for layer, count in zip(self.shape.layers, counts, strict=True):
            buffers = layer_buffers(self.spec, layer, self.batch, context, count, self.dtype)
            for name, buffer in buffers.items():
                sums[name] = sums.get(name, 0) + buffer.nbytes
        return sums | {"positions": position_buffer(self.batch, context).nbytes}

    def largest_context(self, room: int) -> int:
        """Return the most tokens whose cache is within `room` bytes."""
        if room < self.cache_bytes(1):
            return 0
        fits, too_many = 1, 2
        while self.cache_bytes(too_many) <= room:
            fits, too_many = too_many, 2 * too_many
        while too_many - fits > 1:
            middle = (fits + too_many) // 2
            if self.cache_bytes(middle) <= room:
                fits = middle
            else:
                too_many = middle
        return fits


def plan(
    shape: ModelShape,
    spec: KvSpec,
    context: int,
    batch: int,
    dtype: str,
    gpu_memory_bytes: int | None,
) -> MemoryPlan:
    """Plan the memory of one spec.

    Args:
        shape: the model, from `read_shape`.
        spec: the scheme.
        context: tokens of each sequence.
        batch: sequences.
        dtype: `auto` for the checkpoint's, or one of `DTYPES`.
        gpu_memory_bytes: what weights and cache have to fit in; None to leave the question open.

    Raises:
        InputError: when a number is not positive, the dtype unknown, or the groups do not fit.
    """
    if context < 1 or batch < 1:
        raise InputError(f"context {context} and batch {batch} must be at least 1")
    load = _Load(shape, spec, batch, _resolve_dtype(shape, dtype))
    weights = shape.weights_bytes(load.dtype)
    cache = load.cache_bytes(context)
    fp16 = exact_bytes(shape.layers, batch, context)
    total = cache + (weights or 0)
    room = None if gpu_memory_bytes is None else gpu_memory_bytes - (weights or 0)
    return MemoryPlan(
        spec=str(spec),
        context=context,
        batch=batch,
        dtype=load.dtype,
        bytes_per_token=(load.cache_bytes(context + PAGE_TOKENS) - cache) / (PAGE_TOKENS * batch),
        cache_bytes=cache,
        cache_bytes_bound=load.cache_bytes(context, bound=True),
        cache_bytes_fp16=fp16,
        paper_bytes=paper_bytes(spec, shape.layers, batch, context),
        effective_bits=16 * cache / fp16,
        compression=fp16 / cache,
        weights_bytes=weights,
        total_bytes=total,
        gpu_memory_bytes=gpu_memory_bytes,
        fits=None if gpu_memory_bytes is None else total <= gpu_memory_bytes,
        largest_context=None if room is None else load.largest_context(room),
        max_context=shape.max_context,
        breakdown=load.breakdown(context),
        assumptions=_assumptions(load, context, weights),
    )


def parse_bytes(text: str) -> int:
    """Parse an amount of memory: `80GiB`, `80GB`, `81559MiB`, `1.5GiB` or a plain number of bytes.

    GiB is 2**30 and GB is 10**9; `80G` says neither and is refused.

    Raises:
        InputError: when the text is not a positive amount in a known unit.
    """
    match = re.fullmatch(r"(\d+)(?:\.(\d+))?\s*([A-Za-z]*)", text.strip())
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


def _resolve_dtype(shape: ModelShape, dtype: str) -> str:
    if dtype != "auto":
        if dtype not in DTYPES:
            raise InputError(f"dtype {dtype!r} is unknown; use auto or one of: {', '.join(DTYPES)}")
        return dtype
    if shape.dtype not in DTYPES:
        found = "no dtype" if shape.dtype is None else f"dtype {shape.dtype!r}"
        raise InputError(
            f"the config of {shape.name} names {found}; state one with --dtype float16"
        )
    return shape.dtype


def _assumptions(load: _Load, context: int, weights: int | None) -> list[str]:
    lines = [
        f"weights, sinks, recent window and fp caches are held in {load.dtype}",
        "activations, the CUDA context, codebooks and allocator fragmentation are not counted",
    ]
    if weights is None:
        lines.append(
            "no complete safetensors weights beside the config: the total is the cache alone"
        )
    if load.spec.key.per_channel and load.spec.key.outlier_fraction:
        share = f"{load.spec.key.outlier_fraction * 100:g}%"
        lines.append(
            f"keys hold {share} outliers; other text may hold more, up to cache_bytes_bound"
        )
    limit = load.shape.max_context
    if limit is not None and context > limit:
        lines.append(f"context {context} is beyond the {limit} tokens the model was made for")
    return lines
