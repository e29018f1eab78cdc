"""`kvqtool memory-plan`: the memory of models and caches nobody has allocated yet."""

from __future__ import annotations

from dataclasses import asdict, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final, Literal

import typer

from kvqtool.amounts import parse_bytes
from kvqtool.catalog import Gpu, find_gpu
from kvqtool.cli import options as opt
from kvqtool.cli.failures import GATE_EXIT
from kvqtool.cli.output import Output, Table
from kvqtool.cli.plot import draw_plan
from kvqtool.errors import InputError
from kvqtool.explain import Term, explain
from kvqtool.files import check_output
from kvqtool.load import RESERVE_BYTES, Workload
from kvqtool.plan import MemoryPlan, make_load, plans
from kvqtool.questions import best_spec
from kvqtool.scheme import Scheme, bundle_scheme, plain_scheme, with_code_bits
from kvqtool.shape import ModelShape, known_models, read_shape
from kvqtool.spec import PRESETS, parse_spec

if TYPE_CHECKING:
    from kvqtool.measure import Comparison

NAME: Final = "memory-plan"
EPILOG: Final = """\b
Examples:
  kvqtool memory-plan llama-3.1-8b --gpu h100 --prefill-chunk 2048
  kvqtool memory-plan builtin --spec fp --spec nuq3-1% --context 131072 --gpu-memory 80GiB --json
"""
SPECS: Final = ("fp", *PRESETS)
_NESTED: Final = ("breakdown", "terms", "ranks", "assumptions")
_SHOWN: Final = (
    *("spec", "context", "effective_bits", "cache_bytes", "weights_bytes", "prefill_peak_bytes"),
    *("decode_peak_bytes", "total_bytes", "fits", "largest_context", "largest_batch"),
)
MeasureName = Literal["cache", "forward"]
ReadPathName = Literal["materialise", "fused"]


def run(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL",
            help="builtin, a well-known model such as llama-3.1-8b, a folder with config.json, "
            "such a file, or a Hugging Face id.",
        ),
    ],
    spec: Annotated[
        list[str] | None,
        typer.Option(
            "--spec",
            metavar="SPEC",
            show_default=" ".join(SPECS),
            help="Scheme to plan; repeat it to compare.",
        ),
    ] = None,
    bundle: Annotated[
        list[Path] | None,
        typer.Option("--bundle", metavar="FILE", help="Plan a calibrated bundle; repeatable."),
    ] = None,
    context: Annotated[
        list[int] | None,
        typer.Option(
            "--context",
            min=1,
            show_default="the model's",
            help="Tokens of each prompt; repeat it for a table.",
        ),
    ] = None,
    new_tokens: Annotated[
        int, typer.Option("--new-tokens", min=0, help="Tokens generated after each prompt.")
    ] = 0,
    batch: Annotated[int, typer.Option("--batch", min=1, help="Sequences at once.")] = 1,
    prefill_chunk: Annotated[
        int | None,
        typer.Option(
            "--prefill-chunk",
            min=1,
            show_default="whole",
            help="Tokens of a prompt that one call reads.",
        ),
    ] = None,
    code_bits: Annotated[
        float | None,
        typer.Option(
            "--code-bits",
            min=0,
            max=8,
            show_default="8, the most",
            help="Bits of a code where tokens choose them, as ppl reports them: for qaq.",
        ),
    ] = None,
    tp: Annotated[int, typer.Option("--tp", min=1, help="GPUs that share every layer.")] = 1,
    pp: Annotated[int, typer.Option("--pp", min=1, help="GPUs that share the layers.")] = 1,
    context_parallel: Annotated[
        int,
        typer.Option(
            "--context-parallel", min=1, help="GPUs that share the tokens of each sequence."
        ),
    ] = 1,
    read_path: Annotated[
        ReadPathName,
        typer.Option(
            "--read-path",
            help="materialise: caches are read through torch; fused: by the CUDA kernels.",
        ),
    ] = "materialise",
    gpu: Annotated[
        str | None,
        typer.Option(
            "--gpu", metavar="NAME", help="GPU of the catalog to fit: h100, rtx-4090, ..."
        ),
    ] = None,
    gpu_memory: Annotated[
        str | None,
        typer.Option(
            "--gpu-memory",
            metavar="SIZE",
            help="Memory to fit in, as 80GiB, 80GB or bytes; exit 1 if nothing fits.",
        ),
    ] = None,
    reserve: Annotated[
        str | None,
        typer.Option(
            "--reserve",
            metavar="SIZE",
            show_default="512MiB",
            help="Memory left to the GPU's context; 0 for none.",
        ),
    ] = None,
    weights: Annotated[
        str,
        typer.Option(
            "--weights",
            metavar="SOURCE",
            help="auto: the safetensors files, or an estimate for a well-known model; "
            "estimate, none, or a size.",
        ),
    ] = "auto",
    dtype: Annotated[
        opt.DtypeName, typer.Option("--dtype", help="What the model runs in; auto: the config's.")
    ] = "auto",
    revision: opt.Revision = None,
    explain_terms: Annotated[
        bool, typer.Option("--explain", help="Print the arithmetic instead of the table.")
    ] = False,
    measure: Annotated[
        MeasureName | None,
        typer.Option(
            "--measure",
            show_default="no",
            help="Allocate the cache here, or run a forward with random weights, and compare.",
        ),
    ] = None,
    device: opt.Device = "auto",
    plot: Annotated[
        Path | None,
        typer.Option(
            "--plot",
            metavar="FILE",
            help="Draw memory against context; needs pip install 'kvqtool[plot]'.",
        ),
    ] = None,
    output: opt.CopyOutput = None,
    force: opt.Force = False,
    json: opt.Json = False,
    quiet: opt.Quiet = False,
    debug: opt.Debug = False,
) -> None:
    """Plan the memory of a model under several specs, from its config alone."""
    for path in (output, plot):
        if path is not None:
            check_output(path, force)
    schemes = [plain_scheme(parse_spec(text)) for text in spec or ([] if bundle else SPECS)]
    schemes += [bundle_scheme(path) for path in bundle or []]
    if code_bits is not None:
        schemes = [with_code_bits(scheme, code_bits) for scheme in schemes]
    card = None if gpu is None else find_gpu(gpu)
    memory = None if gpu_memory is None else parse_bytes(gpu_memory)
    shape = _read(model, weights, revision)
    contexts = context or [_default_context(shape)]
    work = Workload(
        context=contexts[0],
        batch=batch,
        new_tokens=new_tokens,
        dtype=dtype,
        prefill_chunk=prefill_chunk,
        tp=tp,
        pp=pp,
        context_parallel=context_parallel,
        read_path=read_path,
        reserve_bytes=_reserve(reserve),
    )
    rows = plans(shape, schemes, contexts, work, (card, memory))
    best = best_spec(rows) if rows[0].fits is not None else None
    result: dict[str, Any] = {"rows": rows, "best_spec": best}
    table = _table(rows)
    if explain_terms:
        result["explanation"], table = _explain(shape, schemes, contexts, work)
    if measure is not None:
        result["measured"], table = _measure(measure, device, (shape, schemes, contexts), work)
    out = Output(NAME, json=json, quiet=quiet, path=output, force=force)
    for line in dict.fromkeys(line for row in rows for line in row.assumptions):
        out.note(f"note: {line}")
    if best is not None and len(schemes) > 1:
        out.note(f"note: {best} gives up least of the specs that fit")
    only = rows[0].spec if len(schemes) == 1 else None
    out.result(spec=only, model=model, result=result, table=table)
    if plot is not None:
        draw_plan(plot, rows, (shape, schemes, work), force=force)
        out.note(f"drew {plot}")
    if rows[0].fits is not None and not any(row.fits for row in rows):
        _refuse(rows, card if memory is None else None)


def _read(model: str, weights: str, revision: str | None) -> ModelShape:
    """Read a shape from here, or from the hub where the name can only be a hub id."""
    from kvqtool.hub import fetch_config, fetch_headers, is_hub_id

    if model.lower() in known_models() or not is_hub_id(model):
        return read_shape(model, weights)
    path = fetch_config(model, revision)
    headers = fetch_headers(model, revision) if weights == "auto" else None
    return read_shape(str(path), weights, headers, shown=model)


def _default_context(shape: ModelShape) -> int:
    if shape.max_context is None:
        raise InputError(
            f"the config of {shape.name} names no context; state one with --context 4096"
        )
    return shape.max_context


def _reserve(text: str | None) -> int:
    if text is None:
        return RESERVE_BYTES
    return 0 if text.strip() == "0" else parse_bytes(text)


def _table(rows: list[MemoryPlan]) -> Table:
    names = [field.name for field in fields(MemoryPlan) if field.name not in _NESTED]
    cells = [[getattr(row, name) for name in names] for row in rows]
    return Table(tuple(names), cells, on_terminal=_SHOWN)


def _explain(
    shape: ModelShape, schemes: list[Scheme], contexts: list[int], work: Workload
) -> tuple[list[dict[str, Any]], Table]:
    """Return every term of every row: for JSON, and as a table."""
    said: list[dict[str, Any]] = []
    for scheme in schemes:
        load = make_load(shape, scheme, work)
        for length in contexts:
            place = {"spec": scheme.name, "context": length}
            said += [place | asdict(term) for term in explain(load, length)]
    names = ("spec", "context", *(field.name for field in fields(Term)))
    return said, Table(names, [[line[name] for name in names] for line in said])


def _measure(
    what: str, device: str, asked: tuple[ModelShape, list[Scheme], list[int]], work: Workload
) -> tuple[list[dict[str, Any]], Table]:
    """Allocate or run every row and return planned and measured bytes: for JSON, and as a table."""
    from kvqtool.measure import measure_cache, measure_forward
    from kvqtool.models import resolve_device

    shape, schemes, contexts = asked
    place, compare = resolve_device(device), measure_cache if what == "cache" else measure_forward
    said: list[dict[str, Any]] = []
    for scheme in schemes:
        load = make_load(shape, scheme, work)
        for length in contexts:
            found: list[Comparison] = compare(load, length, place)
            said += [
                {"spec": scheme.name, "context": length} | asdict(row) | {"error": row.error}
                for row in found
            ]
    names = ("spec", "context", "name", "planned_bytes", "measured_bytes", "error")
    return said, Table(names, [[line[name] for name in names] for line in said])


def _refuse(rows: list[MemoryPlan], card: Gpu | None) -> None:
    smallest = min(rows, key=lambda row: row.total_bytes)
    found = f"total_bytes {smallest.total_bytes} of {smallest.spec}"
    memory = smallest.gpu_memory_bytes
    limit = f"--gpu-memory {memory}" if card is None else f"--gpu {card.name} ({memory})"
    typer.echo(f"gate not met: {found} is above {limit}", err=True)
    raise typer.Exit(GATE_EXIT)
