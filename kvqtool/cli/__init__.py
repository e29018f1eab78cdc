"""The command line: six commands, each in its own file."""

from __future__ import annotations

from typing import Annotated, Final

import typer

from kvqtool import __version__
from kvqtool.cli import calibrate, doctor, generate, memory_plan, ppl, quantize_cache
from kvqtool.cli.failures import Command, one_voice, stop_on_terminate

app = typer.Typer(
    name="kvqtool",
    help="Compress the KV cache of a language model, measure what it costs, plan what it buys.",
    epilog="Start with: kvqtool ppl builtin. Every command has --help with examples.",
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    no_args_is_help=True,
    add_completion=False,
)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"kvqtool {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Print the version and exit."
        ),
    ] = False,
) -> None:
    """Compress the KV cache of a language model, measure what it costs, plan what it buys."""


_MODULES: Final = (calibrate, ppl, quantize_cache, generate, memory_plan, doctor)
COMMANDS: Final = tuple(module.NAME for module in _MODULES)
for _module in _MODULES:
    app.command(cls=Command, name=_module.NAME, epilog=_module.EPILOG)(_module.run)


def main() -> None:
    """Run the command line: the console script and `python -m kvqtool`."""
    stop_on_terminate()
    with one_voice():
        app(prog_name="kvqtool")
