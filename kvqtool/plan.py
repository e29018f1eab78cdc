"""The planner: one row of figures for a spec at a context, and tables of such rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from kvqtool.assumptions import assumptions
from kvqtool.catalog import Gpu
from kvqtool.errors import InputError
from kvqtool.load import Load, Workload, resolve_dtype
from kvqtool.memory import PAGE_TOKENS
from kvqtool.questions import gpus_needed, largest_batch, largest_context, smallest_gpu
from kvqtool.scheme import Scheme, plain_scheme
from kvqtool.shape import ModelShape
from kvqtool.spec import KvSpec


@dataclass(frozen=True)
class MemoryPlan:
    """What one spec costs at one context and batch; with several GPUs, on the fullest of them.

    docs/json.md says what each field means.
    """

    spec: str
    context: int
    batch: int
    new_tokens: int
    dtype: str
    tp: int
    pp: int
    context_parallel: int
    stage: int
    bytes_per_token: float
    peak_bytes_per_token: float
    cache_bytes: int
    cache_bytes_bound: int
    cache_bytes_fp16: int
    paper_bytes: float
    effective_bits: float
    compression: float
    weights_bytes: int | None
    prefill_peak_bytes: int
    decode_peak_bytes: int
    total_bytes: int
    gpu: str | None
    gpu_memory_bytes: int | None
    fits: bool | None
    margin_bytes: int | None
    largest_context: int | None
    largest_batch: int | None
    smallest_gpu: str | None
    gpus_needed: int | None
    decode_tokens_per_second_estimate: float | None
    max_context: int | None
    breakdown: dict[str, int]
    terms: dict[str, int]
    phase: str
    ranks: list[dict[str, int | None]]
    assumptions: list[str]


def plan(
    shape: ModelShape,
    spec: KvSpec,
    work: Workload,
    gpu: Gpu | None = None,
    memory: int | None = None,
) -> MemoryPlan:
    """Plan the memory of one spec; see `plans`."""
    return plans(shape, [plain_scheme(spec)], [work.context], work, (gpu, memory))[0]


def plans(
    shape: ModelShape,
    schemes: Sequence[Scheme],
    contexts: Sequence[int],
    work: Workload,
    room: tuple[Gpu | None, int | None] = (None, None),
) -> list[MemoryPlan]:
    """Plan every scheme at every context.

    Args:
        shape: the model, from `read_shape`.
        schemes: specs and bundles.
        contexts: tokens of each prompt, in place of the workload's.
        work: what the model is asked to do.
        room: the GPU it runs on, and bytes of memory in place of the GPU's own; None leaves the
            question open.

    Raises:
        InputError: when the dtype is unknown, the model cannot be divided or packed so, or its
            weights are unknown and so whether they fit.
    """
    gpu, memory = room
    if shape.weights is None and (gpu is not None or memory is not None):
        raise InputError(
            f"the weights of {shape.name} are unknown, so what fits is too; put its safetensors "
            "files beside the config, give --weights SIZE, or leave them out: --weights none"
        )
    if memory is None and gpu is not None:
        memory = gpu.memory_bytes
    rows = []
    for scheme in schemes:
        load = make_load(shape, scheme, work)
        longest = None if memory is None else largest_context(load, memory, work.batch)
        for context in contexts:
            load.check(context)
            row = _row(load, context, (gpu, memory), longest)
            rows.append(replace(row, spec=scheme.name))
    return rows


def make_load(shape: ModelShape, scheme: Scheme, work: Workload) -> Load:
    """Put a scheme, a model and a workload together."""
    resolved = replace(work, dtype=resolve_dtype(shape, work.dtype))
    return Load(scheme.applied_to(shape), scheme.spec, resolved)


def _row(
    load: Load, context: int, room: tuple[Gpu | None, int | None], longest: int | None
) -> MemoryPlan:
    (gpu, memory), work, batch = room, load.work, load.work.batch
    tokens, stage = load.held(context) + work.new_tokens, load.fullest(context, batch)
    cached, peak = load.forward(stage, batch).cache, load.peak(stage, context, batch)
    prefill, decode = load.peaks(stage, context, batch)
    extras, total = load.extras(stage, peak.nbytes), load.total(stage, context, batch)
    nbytes, (stored, exact) = cached.nbytes(tokens), _all_stages(load, tokens)
    return MemoryPlan(
        spec=str(load.spec),
        context=context,
        batch=batch,
        new_tokens=work.new_tokens,
        dtype=work.dtype,
        tp=work.tp,
        pp=work.pp,
        context_parallel=work.context_parallel,
        stage=stage,
        bytes_per_token=(cached.nbytes(tokens + PAGE_TOKENS) - nbytes) / (PAGE_TOKENS * batch),
        peak_bytes_per_token=_peak_growth(load, stage, context),
        cache_bytes=nbytes,
        cache_bytes_bound=cached.nbytes(tokens, bound=True),
        cache_bytes_fp16=cached.fp16_bytes(tokens),
        paper_bytes=cached.paper_bytes(tokens),
        effective_bits=16 * stored / exact,
        compression=exact / stored,
        weights_bytes=load.ranks[stage].weights_bytes,
        prefill_peak_bytes=prefill.nbytes,
        decode_peak_bytes=decode.nbytes,
        total_bytes=total,
        gpu=gpu.name if gpu else None,
        gpu_memory_bytes=memory,
        fits=None if memory is None else total <= memory,
        margin_bytes=None if memory is None else memory - total,
        largest_context=longest,
        largest_batch=None if memory is None else largest_batch(load, memory, context),
        smallest_gpu=smallest_gpu(total) if load.shape.weights else None,
        gpus_needed=None if memory is None else gpus_needed(load, memory, context),
        decode_tokens_per_second_estimate=load.speed(gpu, context) if gpu else None,
        max_context=load.shape.max_context,
        breakdown=cached.breakdown(tokens),
        terms=peak.terms | extras,
        phase=f"{load.call(stage, context, batch)}: {peak.phase}",
        ranks=_ranks(load, context) if work.gpus > 1 else [],
        assumptions=assumptions(load, context),
    )


def _all_stages(load: Load, tokens: int) -> tuple[int, int]:
    """Return the cache of one GPU of each stage, as stored and in 16-bit floats: the fullest stage
    may have no cache at all.
    """
    caches = [load.forward(rank.stage, load.work.batch).cache for rank in load.ranks]
    exact = sum(cached.fp16_bytes(tokens) for cached in caches)
    if not exact:
        raise InputError(f"no layer of {load.shape.name} keeps a cache; there is nothing to plan")
    return sum(cached.nbytes(tokens) for cached in caches), exact


def _peak_growth(load: Load, stage: int, context: int) -> float:
    """Return what one more token of a GPU adds to the peak, averaged over the next chunk."""
    batch, step = load.work.batch, max(load.work.prefill_chunk or 0, PAGE_TOKENS)
    further = context + step * load.work.context_parallel  # `step` of them go to each GPU
    grown = load.peak(stage, further, batch).nbytes - load.peak(stage, context, batch).nbytes
    return grown / (step * batch)


def _ranks(load: Load, context: int) -> list[dict[str, int | None]]:
    """Return a row for one GPU of each stage."""
    batch, tokens = load.work.batch, load.held(context) + load.work.new_tokens
    return [
        {
            "stage": rank.stage,
            "gpus": load.work.tp * load.work.context_parallel,
            "layers": len(rank.layers),
            "weights_bytes": rank.weights_bytes,
            "cache_bytes": load.forward(rank.stage, batch).cache.nbytes(tokens),
            "total_bytes": load.total(rank.stage, context, batch),
        }
        for rank in load.ranks
    ]
