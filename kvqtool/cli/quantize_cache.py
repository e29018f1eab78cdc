"""`kvqtool quantize-cache`: write a document's compressed cache to a file."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Final

import typer

from kvqtool.cli import options as opt
from kvqtool.cli.inputs import Calibration, ModelChoice, Scheme
from kvqtool.cli.output import Output, Table
from kvqtool.cli.reports import note_cache, note_layers
from kvqtool.errors import InputError
from kvqtool.files import check_output

NAME: Final = "quantize-cache"
EPILOG: Final = """\b
Examples:
  kvqtool quantize-cache builtin --bundle kvq3.safetensors --text notes.txt -o notes.safetensors
  kvqtool quantize-cache builtin --spec int4-g64 --text notes.txt --json -o int4-notes.safetensors
"""


def run(
    model: opt.Model,
    *,
    bundle: opt.Bundle = None,
    spec: opt.Spec = None,
    calibration_dataset: opt.CalibrationDataset = None,
    calibration_samples: opt.CalibrationSamples = opt.SAMPLES,
    calibration_seq_len: opt.CalibrationSeqLen = opt.SEQ_LEN,
    text: Annotated[
        str | None, typer.Option("--text", metavar="FILE", help="Document to read; - for stdin.")
    ] = None,
    kv_states: Annotated[
        Path | None,
        typer.Option(
            "--kv-states", metavar="FILE", help="Safetensors file of key and value states instead."
        ),
    ] = None,
    text_column: opt.TextColumn = "text",
    prefill: opt.Prefill = "exact",
    prefill_chunk: opt.PrefillChunk = None,
    output: opt.RequiredOutput,
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
    """Read a document once and write its compressed cache, for kvqtool generate to go on from."""
    if (text is None) == (kv_states is None):
        raise InputError("give the document with --text FILE, or its states with --kv-states FILE")
    if kv_states is not None and prefill_chunk is not None:
        raise InputError("--prefill-chunk is for documents; drop it, or give --text FILE")
    if kv_states is not None and not kv_states.is_file():
        raise InputError(f"states file {kv_states} does not exist; check the path")
    calibration = Calibration(calibration_dataset, calibration_samples, calibration_seq_len, seed)
    scheme = Scheme.choose(bundle, spec, calibration)
    check_output(output, force)
    out = Output(NAME, json=json, quiet=quiet)
    choice = ModelChoice(model, device, dtype, revision, trust_remote_code, device_map, read_path)
    loaded = choice.load(out)
    from kvqtool.cachefile import quantize_states, quantize_text
    from kvqtool.data import load_text
    from kvqtool.forward import Reading

    if kv_states is not None:
        ready = scheme.prepare(loaded, out)
        report = quantize_states(loaded, ready, kv_states, output, force=force)
    else:
        document = load_text(text, part="evaluation", text_column=text_column)
        ready, reading = scheme.prepare(loaded, out), Reading(prefill, prefill_chunk)
        report = quantize_text(loaded, ready, document, output, reading=reading, force=force)
    note_layers(report.layers, out)
    note_cache(report, out)
    path_line = Table((), [(str(output),)])
    out.result(spec=report.spec, model=model, result=report, table=path_line)
