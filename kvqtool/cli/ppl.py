"""`kvqtool ppl`: measure what a compressed cache costs in quality."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Final, Literal

import typer

from kvqtool.cli import options as opt
from kvqtool.cli.gates import Gate, enforce
from kvqtool.cli.inputs import (
    Calibration,
    ModelChoice,
    Scheme,
    refuse_shared_stdin,
    window_length,
)
from kvqtool.cli.output import Output, Table, values_table
from kvqtool.cli.reports import note_layers
from kvqtool.errors import InputError
from kvqtool.files import check_output
from kvqtool.ranks import read_ranks

if TYPE_CHECKING:
    from kvqtool.bundle import Bundle
    from kvqtool.data import Text
    from kvqtool.models import LoadedModel

NAME: Final = "ppl"
EPILOG: Final = """\b
Examples:
  kvqtool ppl builtin --bundle kvq3.safetensors --seq-len 512 --windows 2
  kvqtool ppl builtin --spec int4-g64 --seq-len 256 --windows 2 --max-ppl-ratio 2 --json
"""
ProtocolName = Literal["decode-exact", "true-decode", "prefill-exact"]
TaskName = Literal["perplexity", "passkey", "choices"]


def run(
    model: opt.Model,
    bundle: opt.Bundle = None,
    spec: opt.Spec = None,
    calibration_dataset: opt.CalibrationDataset = None,
    calibration_samples: opt.CalibrationSamples = opt.SAMPLES,
    calibration_seq_len: opt.CalibrationSeqLen = opt.SEQ_LEN,
    dataset: opt.Dataset = None,
    text_column: opt.TextColumn = "text",
    seq_len: opt.SeqLen = opt.SEQ_LEN,
    windows: Annotated[
        int | None,
        typer.Option("--windows", min=1, show_default="all", help="Windows to score."),
    ] = None,
    stride: Annotated[
        int | None,
        typer.Option(
            "--stride", min=1, show_default="--seq-len", help="Tokens between window starts."
        ),
    ] = None,
    protocol: Annotated[
        ProtocolName,
        typer.Option(
            "--protocol",
            help="decode-exact: queries see what decoding would have stored; true-decode: token by "
            "token; prefill-exact: first half exact then packed, second half scored.",
        ),
    ] = "decode-exact",
    task: Annotated[
        TaskName,
        typer.Option(
            "--task",
            help="passkey: ask for numbers hidden in the text instead; choices: answer the "
            "multiple-choice questions of --dataset, a .jsonl of question, choices and answer.",
        ),
    ] = "perplexity",
    lengths: Annotated[
        str,
        typer.Option("--lengths", metavar="N,N,...", help="Tokens of a passkey prompt."),
    ] = "512,1024",
    trials: Annotated[
        int, typer.Option("--trials", min=1, help="Passkey prompts of each length.")
    ] = 6,
    max_ppl_ratio: Annotated[
        float | None, typer.Option("--max-ppl-ratio", help="Gate: exit 1 if ppl_ratio is above.")
    ] = None,
    max_kld: Annotated[
        float | None, typer.Option("--max-kld", help="Gate: exit 1 if kld_mean is above.")
    ] = None,
    min_compression: Annotated[
        float | None,
        typer.Option(
            "--min-compression", help="Gate: exit 1 if cache_bytes_fp16 / cache_bytes is below."
        ),
    ] = None,
    allow_calibration_text: Annotated[
        bool,
        typer.Option("--allow-calibration-text", help="Score even the text it was calibrated on."),
    ] = False,
    output: opt.CopyOutput = None,
    force: opt.Force = False,
    read_path: opt.ReadPath = "auto",
    device: opt.Device = "auto",
    device_map: opt.DeviceMap = None,
    dtype: opt.Dtype = "auto",
    seed: opt.Seed = 0,
    revision: opt.Revision = None,
    trust_remote_code: opt.TrustRemoteCode = False,
    json: opt.Json = False,
    quiet: opt.Quiet = False,
    debug: opt.Debug = False,
) -> None:
    """Measure the quality of a model with a compressed cache against its exact cache."""
    calibration = Calibration(calibration_dataset, calibration_samples, calibration_seq_len, seed)
    scheme = Scheme.choose(bundle, spec, calibration)
    tokens = _lengths(lengths)
    gates = {"--max-ppl-ratio": max_ppl_ratio, "--max-kld": max_kld}
    gates["--min-compression"] = min_compression
    if task != "perplexity":
        _check_task(task, dataset, gates)
    refuse_shared_stdin(dataset, calibration_dataset)
    if output is not None:
        check_output(output, force)
    path = output if read_ranks().is_first else None
    out = Output(NAME, json=json, quiet=quiet, path=path, force=force)
    choice = ModelChoice(model, device, dtype, revision, trust_remote_code, device_map, read_path)
    loaded = choice.load_shared(out)
    from kvqtool.data import evaluation_windows, load_text
    from kvqtool.perplexity import evaluate

    if task == "choices":
        _choose(loaded, str(dataset), scheme.prepare(loaded, out), out)
        return
    text = load_text(dataset, part="evaluation", text_column=text_column)
    if task == "passkey":
        _ask(loaded, text, scheme.prepare(loaded, out), (tokens, trials, seed), out)
        return
    length = window_length(seq_len, loaded, out)
    scored = evaluation_windows(
        text, loaded.tokenizer, seq_len=length, windows=windows, stride=stride
    )
    ready = scheme.prepare(loaded, out)
    with out.progress() as progress:
        (result,) = evaluate(
            loaded,
            scored,
            [ready],
            protocol=protocol,
            allow_calibration_text=allow_calibration_text,
            progress=progress,
        )
    note_layers(result.layers, out)
    out.result(spec=result.spec, model=model, result=result, table=values_table(result))
    compression = result.cache_bytes_fp16 / result.cache_bytes
    enforce(
        (
            Gate("ppl_ratio", result.ppl_ratio, "--max-ppl-ratio", max_ppl_ratio),
            Gate("kld_mean", result.kld_mean, "--max-kld", max_kld),
            Gate("compression", compression, "--min-compression", min_compression, is_floor=True),
        )
    )


def _ask(
    loaded: LoadedModel, text: Text, bundle: Bundle, how: tuple[list[int], int, int], out: Output
) -> None:
    """Run the passkey task and print it: a row a length."""
    from kvqtool.passkey import Hunt, passkey

    lengths, trials, seed = how
    with out.progress() as progress:
        result = passkey(loaded, text, bundle, Hunt(tuple(lengths), trials, seed), progress)
    note_layers(result.layers, out)
    rows = [tuple(row.values()) for row in result.lengths]
    table = Table(tuple(result.lengths[0]), rows)
    out.result(spec=result.spec, model=loaded.identity.name, result=result, table=table)


def _choose(loaded: LoadedModel, dataset: str, bundle: Bundle, out: Output) -> None:
    """Run the multiple-choice task and print it."""
    from kvqtool.choices import choose

    with out.progress() as progress:
        result = choose(loaded, dataset, bundle, progress)
    note_layers(result.layers, out)
    name = loaded.identity.name
    out.result(spec=result.spec, model=name, result=result, table=values_table(result))


def _lengths(text: str) -> list[int]:
    """Parse the prompt lengths."""
    parts = text.split(",")
    if not all(part.strip().isdecimal() and 0 < int(part) < 10**8 for part in parts):
        raise InputError(f"--lengths {text!r} is not numbers of tokens; write 1024,2048")
    return [int(part) for part in parts]


def _check_task(task: str, dataset: str | None, gates: dict[str, float | None]) -> None:
    """Refuse gates on what another task does not measure, and choices without questions."""
    if task == "choices" and dataset is None:
        raise InputError("--task choices needs questions; name a .jsonl file with --dataset")
    for name, limit in gates.items():
        if limit is not None:
            raise InputError(f"{name} is a gate on perplexity; drop it or drop --task {task}")
