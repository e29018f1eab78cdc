"""generate: the text on stdout; a saved cache goes on without its document."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import Result

Run = Callable[..., Result]
PROMPT = "The list type is a"
FEW = ("--max-new-tokens", 8)


def test_stdout_is_the_text_and_a_newline(run: Run, bundle: Path) -> None:
    done = run("generate", "builtin", "--bundle", bundle, "--prompt", PROMPT, *FEW)
    assert done.exit_code == 0, done.stderr
    again = run("generate", "builtin", "--bundle", bundle, "--prompt", PROMPT, *FEW, "--json", "-q")
    said = json.loads(again.stdout)
    assert again.stderr == ""
    assert done.stdout == said["result"]["text"] + "\n"
    assert said["command"] == "generate"
    assert said["spec"] == "kvq3"
    assert said["result"]["new_tokens"] <= 8


def test_the_prompt_comes_from_a_file_or_stdin_as_well(run: Run, tmp_path: Path) -> None:
    written = tmp_path / "prompt.txt"
    written.write_text(PROMPT)
    common = ("generate", "builtin", "--spec", "int4-g64", *FEW, "-q")
    said = run(*common, "--prompt", PROMPT).stdout
    assert run(*common, "--prompt-file", written).stdout == said
    assert run(*common, "--prompt", "-", stdin=PROMPT).stdout == said


def test_a_prompt_is_read_in_parts_of_the_asked_size(run: Run) -> None:
    common = (
        "generate",
        "builtin",
        "--spec",
        "int4-g64",
        "--prompt",
        PROMPT * 3,
        *FEW,
        "-q",
        "--json",
    )
    results = [
        json.loads(run(*common, "--prefill-chunk", size).stdout)["result"] for size in (4, 1000)
    ]
    assert [result["prefill_chunk"] for result in results] == [4, 1000]
    calls = [sum(result["layers"][0]["read_calls"].values()) for result in results]
    assert calls[0] - calls[1] == (results[0]["prompt_tokens"] - 1) // 4


def test_the_same_seed_draws_the_same_text(run: Run) -> None:
    common = ("generate", "builtin", "--spec", "fp", "--prompt", PROMPT, *FEW, "-q")
    drawn = [
        run(*common, "--temperature", 1.5, "--top-k", 50, "--seed", seed).stdout
        for seed in (1, 1, 2)
    ]
    assert drawn[0] == drawn[1] != drawn[2]


def test_a_saved_cache_goes_on_as_the_uninterrupted_run(run: Run, tmp_path: Path) -> None:
    saved = tmp_path / "doc.safetensors"
    scheme = ("--spec", "int4-g64")
    run("quantize-cache", "builtin", *scheme, "--text", "-", "-o", saved, stdin=PROMPT)
    whole = run("generate", "builtin", *scheme, "--prompt", PROMPT, *FEW, "-q")
    resumed = run("generate", "builtin", "--cache", saved, *FEW, "-q")
    assert resumed.exit_code == 0, resumed.stderr
    assert resumed.stdout == whole.stdout


def test_reports_name_what_read_the_cache_and_why(run: Run, bundle: Path) -> None:
    common = ("generate", "builtin", "--bundle", bundle, "--prompt", PROMPT, *FEW, "--json")
    for read_path, kernel, reason in (
        ("auto", "torch (materialise)", "no CUDA device"),
        ("materialise", "torch (materialise)", "asked for"),
        ("fused", "torch (fused reference)", None),
    ):
        done = run(*common, "--device", "cpu", "--read-path", read_path)
        result = json.loads(done.stdout)["result"]
        assert result["kernel"] == kernel
        assert {row["read_reason"] for row in result["layers"]} == {reason}
        header, row = [line.split("\t") for line in done.stderr.splitlines() if "\t" in line][:2]
        told = dict(zip(header, row, strict=True))
        assert told["layers"].startswith("0")
        assert told.get("why") == reason


def test_a_layer_without_a_kernel_is_refused_where_kernels_were_asked_for(run: Run) -> None:
    common = ("generate", "builtin", "--spec", "int4-g64", "--prompt", PROMPT, "-q")
    done = run(*common, "--read-path", "fused")
    assert done.exit_code == 2
    assert "layer 0 cannot be read by the fused kernel: keys with a range per token" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ((), "the prompt is empty"),
        (("--prompt", " "), "the prompt is empty"),
        (("--prompt", "a", "--prompt-file", "b"), "exclude each other"),
        (("--prompt-file", "missing.txt"), "cannot be read"),
        (("--cache", "missing.safetensors"), "does not exist"),
        (("--cache", "c", "--spec", "fp"), "carries its own bundle"),
    ],
)
def test_bad_prompts_are_one_line(run: Run, arguments: tuple[str, ...], says: str) -> None:
    done = run("generate", "builtin", *arguments)
    assert done.exit_code == 2
    assert says in done.stderr
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("mode", "says"),
    [
        ("graph", "no graph can hold a step: the model is not on one CUDA device; use --decode"),
        ("graphs", "decode 'graphs' is unknown; use one of: auto, graph, eager"),
    ],
)
def test_a_way_to_decode_that_cannot_be_is_refused(run: Run, mode: str, says: str) -> None:
    scheme = ("--spec", "int4-g64", "--prompt", PROMPT, "--device", "cpu", "-q")
    done = run("generate", "builtin", *scheme, "--decode", mode)
    assert done.exit_code == 2
    assert done.stderr.startswith(f"error: {says}")
    assert done.stderr.count("\n") == 1
