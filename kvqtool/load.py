"""A model at work: what each of its GPUs has to hold, margins included, at any length and batch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Final

from kvqtool.catalog import Gpu
from kvqtool.errors import InputError
from kvqtool.kernel_scratch import unplannable
from kvqtool.layers import CacheModel
from kvqtool.memory import PAGE_TOKENS
from kvqtool.peaks import WORKSPACE_BYTES, Forward, Peak, codebook_bytes
from kvqtool.shape import ModelShape
from kvqtool.sharding import RankShape, check_pages, divide, first_pages
from kvqtool.spec import KvSpec

DTYPES: Final = ("float16", "bfloat16", "float32")
# Stated margins: what CUDA keeps for its context, and what torch's allocator cannot use.
RESERVE_BYTES: Final = 512 << 20
FRAGMENTATION: Final = 0.02


@dataclass(frozen=True)
class Workload:
    """What a model is asked to do, and on how many GPUs.

    Args:
        context: tokens of each prompt.
        batch: sequences at once.
        new_tokens: tokens generated after each prompt.
        dtype: `auto` for the checkpoint's, or one of `DTYPES`.
        prefill_chunk: tokens of a prompt that one call reads; None for all, as kvqtool does.
        tp: GPUs that share each layer.
        pp: GPUs that share the layers.
        context_parallel: GPUs that share the tokens of each sequence.
        reserve_bytes: what is left to the CUDA context.
        read_path: `materialise` (torch) or `fused` (the kernels).
    """

    context: int
    batch: int = 1
    new_tokens: int = 0
    dtype: str = "auto"
    prefill_chunk: int | None = None
    tp: int = 1
    pp: int = 1
    context_parallel: int = 1
    reserve_bytes: int = RESERVE_BYTES
    read_path: str = "materialise"

    @property
    def gpus(self) -> int:
        """All of them."""
        return self.tp * self.pp * self.context_parallel

    def __post_init__(self) -> None:
        for name in ("context", "batch", "prefill_chunk", "tp", "pp", "context_parallel"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise InputError(f"{name} {value} must be at least 1")
        if self.new_tokens < 0 or self.reserve_bytes < 0:
            raise InputError("new tokens and reserve must not be negative")


@dataclass(frozen=True)
class Load:
    """A model under one spec and workload; context and batch can be asked anew.

    Args:
        shape: the model.
        spec: the scheme.
        work: the workload, its dtype resolved.
    """

    shape: ModelShape
    spec: KvSpec
    work: Workload

    @cached_property
    def ranks(self) -> list[RankShape]:
        """One GPU of each pipeline stage."""
        return divide(self.shape, self.work.tp, self.work.pp, self.work.dtype)

    @cached_property
    def forward(self) -> Callable[[int, int], Forward]:
        """The forward pass of a stage at a batch."""

        @cache
        def of(stage: int, batch: int) -> Forward:
            rank = self.ranks[stage]
            model = CacheModel(rank.layers, self.spec, batch, self.work.dtype)
            weights = (
                rank.weights_bytes or 0
            )  # unknown ones are in no total, and there is no verdict
            is_fused = self.work.read_path == "fused"
            chunk = self.work.prefill_chunk
            return Forward(model, rank.trunk, weights, chunk, is_fused=is_fused)

        return of

    @cached_property
    def peaks(self) -> Callable[[int, int, int], tuple[Peak, Peak]]:
        """The peaks of prefill and decode of a stage, at a context and batch."""

        @cache
        def of(stage: int, context: int, batch: int) -> tuple[Peak, Peak]:
            forward, held = self.forward(stage, batch), self.held(context)
            tokens = held + max(self.work.new_tokens, 1)
            return forward.prefill(held), forward.decode(held, tokens)

        return of

    def held(self, context: int) -> int:
        """Return the tokens of a prompt that the fullest GPU keeps: the last one's, to which new
        tokens go; see `context_parallel`.
        """
        first = first_pages(context, self.spec.sink_tokens, self.work.context_parallel)[-1]
        return context - first * PAGE_TOKENS

    def check(self, context: int) -> None:
        """Raise InputError where kernels do not read the model as `read_path` says, or GPUs cannot
        share a context as `context_parallel` says.
        """
        for layer in self.shape.layers if self.work.read_path == "fused" else ():
            reason = unplannable(layer.own_spec or self.spec, layer)
            if reason:
                raise InputError(
                    f"--read-path fused is not planned for {reason}; name what kernels read by "
                    "--spec, or leave it out to plan reading through torch"
                )
        processes, shape = self.work.context_parallel, self.shape
        if processes == 1:
            return
        if any(not layer.is_packed and layer.is_growing for layer in self.shape.layers):
            raise InputError(
                f"--context-parallel shares packed layers, and {shape.name} has others that grow"
            )
        if any(layer.window and layer.window > self.held(context) for layer in shape.layers):
            raise InputError(
                f"--context-parallel {processes} leaves a GPU fewer tokens of {context} than the "
                f"sliding layers of {shape.name} keep; use a longer context or fewer GPUs"
            )
        check_pages(context, self.spec.sink_tokens, processes)

    def peak(self, stage: int, context: int, batch: int) -> Peak:
        """Return the higher of both peaks."""
        return max(self.peaks(stage, context, batch), key=lambda peak: peak.nbytes)

    def call(self, stage: int, context: int, batch: int) -> str:
        """Return which call is the higher: `prefill` or `decode`."""
        prefill, decode = self.peaks(stage, context, batch)
        return "prefill" if prefill.nbytes >= decode.nbytes else "decode"

    def total(self, stage: int, context: int, batch: int) -> int:
        """Return all a stage's GPU has to hold, margins included."""
        highest = self.peak(stage, context, batch).nbytes
        return highest + sum(self.extras(stage, highest).values())

    def extras(self, stage: int, peak: int) -> dict[str, int]:
        """Return what comes beside a stage's peak."""
        return {
            "codebooks": codebook_bytes(self.spec, self.ranks[stage].layers),
            "workspace": WORKSPACE_BYTES,
            "fragmentation": round(FRAGMENTATION * peak),
            "reserve": self.work.reserve_bytes,
        }

    def fullest(self, context: int, batch: int) -> int:
        """Return the stage whose GPU holds most."""
        return max(range(self.work.pp), key=lambda stage: self.total(stage, context, batch))

    def fits(self, memory: int, context: int, batch: int) -> bool:
        """Whether every GPU has room."""
        return all(self.total(s, context, batch) <= memory for s in range(self.work.pp))

    def speed(self, gpu: Gpu, context: int) -> float | None:
        """Return the tokens a second that reading weights and cache once each would allow; None
        where it is not known which weights a token passes.
        """
        active, read = self.shape.active, 0.0
        tokens = self.held(context) + max(self.work.new_tokens, 1)
        for stage, rank in enumerate(self.ranks):
            if active is None or not rank.weights_bytes:
                return None
            cache_bytes = self.forward(stage, self.work.batch).cache.nbytes(tokens)
            read += active * rank.weights_bytes + cache_bytes
        return self.work.batch * gpu.bandwidth / read


def resolve_dtype(shape: ModelShape, dtype: str) -> str:
    """Return the dtype that weights, sinks, window and the model's own caches are held in.

    Raises:
        InputError: when neither the config nor the user names one.
    """
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
