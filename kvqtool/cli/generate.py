"""`kvqtool generate`: text from a model whose cache is compressed."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Final

import typer

from kvqtool.cli import options as opt
from kvqtool.cli.inputs import Calibration, ModelChoice, Scheme
from kvqtool.cli.output import Output
from kvqtool.cli.reports import note_cache, note_layers
from kvqtool.errors import InputError

NAME: Final = "generate"
EPILOG: Final = """\b
Examples:
  kvqtool generate builtin --spec int4-g64 --prompt "The list type" --max-new-tokens 16
  kvqtool generate builtin --cache notes.safetensors --max-new-tokens 16 --json
"""


def run(
    model: opt.Model,
    bundle: opt.Bundle = None,
    spec: opt.Spec = None,
    calibration_dataset: opt.CalibrationDataset = None,
    calibration_samples: opt.CalibrationSamples = opt.SAMPLES,
    calibration_seq_len: opt.CalibrationSeqLen = opt.SEQ_LEN,
    cache: Annotated[
        Path | None,
        typer.Option("--cache", metavar="FILE", help="Go on from what quantize-cache wrote."),
    ] = None,
    prompt: Annotated[
        str | None, typer.Option("--prompt", metavar="TEXT", help="Prompt; - for stdin.")
    ] = None,
    prompt_file: Annotated[
        Path | None, typer.Option("--prompt-file", metavar="FILE", help="Prompt from a file.")
    ] = None,
    max_new_tokens: Annotated[
        int, typer.Option("--max-new-tokens", min=1, help="Most tokens to generate.")
    ] = 64,
    temperature: Annotated[
        float, typer.Option("--temperature", min=0.0, help="0: always the likeliest token.")
    ] = 0.0,
    top_p: Annotated[
        float, typer.Option("--top-p", min=0.0, max=1.0, help="Share of probability to draw from.")
    ] = 1.0,
    top_k: Annotated[
        int, typer.Option("--top-k", min=0, help="Likeliest tokens to draw from; 0 for all.")
    ] = 0,
    prefill: opt.Prefill = "exact",
    prefill_chunk: opt.PrefillChunk = None,
    read_path: opt.ReadPath = "auto",
    decode: Annotated[
        str,
        typer.Option(
            "--decode",
            metavar="MODE",
            help="graph: each step from a CUDA graph, refused where none can hold it; eager; auto.",
        ),
    ] = "auto",
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
    """Generate text from a prompt, or go on from a saved cache, with the cache compressed."""
    if cache is not None and (bundle or spec or calibration_dataset):
        raise InputError(
            f"--cache {cache} carries its own bundle; drop --bundle, --spec and the rest"
        )
    calibration = Calibration(calibration_dataset, calibration_samples, calibration_seq_len, seed)
    scheme = Scheme.choose(bundle, spec, calibration)
    words = _read_prompt(prompt, prompt_file, is_needed=cache is None)
    if cache is not None and not cache.is_file():
        raise InputError(f"cache {cache} does not exist; write one with: kvqtool quantize-cache")
    out = Output(NAME, json=json, quiet=quiet)
    choice = ModelChoice(model, device, dtype, revision, trust_remote_code, device_map, read_path)
    loaded = choice.load(out)
    from kvqtool.generation import Running, generate, resume
    from kvqtool.sampling import Sampling

    running = Running(prefill, decode, prefill_chunk)
    sampling = Sampling(max_new_tokens, temperature, top_p, top_k, seed)
    if cache is not None:
        result = resume(loaded, cache, words, sampling, running=running, on_text=out.text)
    else:
        ready = scheme.prepare(loaded, out)
        result = generate(loaded, ready, words, sampling, running=running, on_text=out.text)
    out.end_text(spec=result.spec, model=model, result=result)
    how = result.decode["reason"]
    steps = f"step by step: {how}" if how else "from a CUDA graph"
    out.note(f"{result.new_tokens} tokens, {result.tokens_per_second:.3g} a second, {steps}")
    note_layers(result.layers, out)
    note_cache(result, out)


def _read_prompt(prompt: str | None, prompt_file: Path | None, *, is_needed: bool) -> str:
    """Return the prompt from the command line, a file or stdin; a saved cache needs none."""
    if prompt is not None and prompt_file is not None:
        raise InputError("--prompt and --prompt-file exclude each other; keep one")
    if prompt_file is not None:
        try:
            text = prompt_file.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(
                f"prompt file {prompt_file} cannot be read: {error}; check it"
            ) from error
    else:
        text = sys.stdin.read() if prompt == "-" else prompt or ""
    if is_needed and not text.strip():
        raise InputError(
            "the prompt is empty; give one with --prompt TEXT, - or --prompt-file FILE"
        )
    return text
