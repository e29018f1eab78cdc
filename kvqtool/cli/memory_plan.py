"""`kvqtool memory-plan`: the bytes of caches nobody has allocated yet."""

from __future__ import annotations

from dataclasses import fields
from typing import Annotated, Final

import typer

from kvqtool.cli import options as opt
from kvqtool.cli.failures import GATE_EXIT
from kvqtool.cli.output import Output, Table
from kvqtool.errors import InputError
from kvqtool.files import check_output
from kvqtool.plan import MemoryPlan, parse_bytes, plan
from kvqtool.shape import read_shape
from kvqtool.spec import parse_spec

NAME: Final = "memory-plan"
EPILOG: Final = """\b
Examples:
  kvqtool memory-plan builtin --context 4096
  kvqtool memory-plan builtin --spec fp --spec nuq3-1% --context 131072 --gpu-memory 80GiB --json
"""
SPECS: Final = ("fp", "nuq4-1%-sink1", "nuq3-1%-sink1", "nuq2-1%-sink1")
_NESTED: Final = ("breakdown", "assumptions")
_SHOWN: Final = (
    *("spec", "effective_bits", "bytes_per_token", "cache_bytes", "cache_bytes_bound"),
    *("paper_bytes", "total_bytes", "fits", "largest_context"),
)


def run(
    model: Annotated[
        str,
        typer.Argument(metavar="MODEL", help="builtin, a folder with config.json, or such a file."),
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
    context: Annotated[
        int | None,
        typer.Option(
            "--context", min=1, show_default="the model's", help="Tokens of each sequence."
        ),
    ] = None,
    batch: Annotated[int, typer.Option("--batch", min=1, help="Sequences at once.")] = 1,
    gpu_memory: Annotated[
        str | None,
        typer.Option(
            "--gpu-memory",
            metavar="SIZE",
            help="Memory to fit in, as 80GiB, 80GB or bytes; exit 1 if no spec fits.",
        ),
    ] = None,
    dtype: Annotated[
        opt.DtypeName, typer.Option("--dtype", help="What the model runs in; auto: the config's.")
    ] = "auto",
    output: opt.CopyOutput = None,
    force: opt.Force = False,
    json: opt.Json = False,
    quiet: opt.Quiet = False,
    debug: opt.Debug = False,
) -> None:
    """Plan the memory of a model's cache under several specs, from its config alone."""
    if output is not None:
        check_output(output, force)
    schemes = [parse_spec(text) for text in spec or SPECS]
    memory = None if gpu_memory is None else parse_bytes(gpu_memory)
    shape = read_shape(model)
    length = context or shape.max_context
    if length is None:
        raise InputError(f"the config of {model} names no context; state one with --context 4096")
    plans = [plan(shape, scheme, length, batch, dtype, memory) for scheme in schemes]
    out = Output(NAME, json=json, quiet=quiet, path=output, force=force)
    for line in dict.fromkeys(line for row in plans for line in row.assumptions):
        out.note(f"note: {line}")
    only = plans[0].spec if len(plans) == 1 else None
    out.result(spec=only, model=model, result={"rows": plans}, table=_table(plans))
    if memory is not None and not any(row.fits for row in plans):
        _refuse(plans, memory)


def _table(plans: list[MemoryPlan]) -> Table:
    names = [field.name for field in fields(MemoryPlan) if field.name not in _NESTED]
    rows = [[getattr(row, name) for name in names] for row in plans]
    return Table(tuple(names), rows, on_terminal=_SHOWN)


def _refuse(plans: list[MemoryPlan], memory: int) -> None:
    smallest = min(plans, key=lambda row: row.total_bytes)
    found = f"total_bytes {smallest.total_bytes} of {smallest.spec}"
    typer.echo(f"gate not met: {found} is above --gpu-memory {memory}", err=True)
    raise typer.Exit(GATE_EXIT)
