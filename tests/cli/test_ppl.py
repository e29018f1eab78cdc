"""ppl: figures in three forms, gates, and no evaluation on calibration text."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import Result

from kvqtool.cli.gates import Gate

Run = Callable[..., Result]
SMALL = ("--seq-len", 64, "--windows", 2)
RELIED_ON = {
    *("ppl", "ppl_baseline", "ppl_ratio", "ppl_ratio_stderr", "kld_mean", "kld_p999", "same_top1"),
    *("effective_bits", "cache_bytes", "cache_bytes_fp16", "paper_bytes", "bundle_bytes"),
    "protocol",
}


def test_json_has_the_keys_that_scripts_rely_on(run: Run, bundle: Path) -> None:
    done = run("ppl", "builtin", "--bundle", bundle, *SMALL, "--json", "-q")
    assert done.exit_code == 0, done.stderr
    assert done.stderr == ""
    said = json.loads(done.stdout)
    assert (said["command"], said["spec"], said["model"]) == ("ppl", "kvq3", "builtin")
    assert set(said["result"]) >= RELIED_ON
    assert said["result"]["protocol"]["seq_len"] == 64
    assert said["result"]["protocol"]["windows"] == 2


def test_piped_lines_are_name_and_value_of_the_same_figures(
    run: Run, bundle: Path, tmp_path: Path
) -> None:
    copy = tmp_path / "ppl.tsv"
    arguments: tuple[Any, ...] = ("ppl", "builtin", "--bundle", bundle, *SMALL)
    done = run(*arguments, "-o", copy)
    lines = dict(line.split("\t") for line in done.stdout.splitlines())
    assert lines["name"] == "value"
    exact = json.loads(run(*arguments, "--json").stdout)["result"]
    assert float(lines["ppl"]) == exact["ppl"]
    assert lines["protocol.dataset_sha256"] == exact["protocol"]["dataset_sha256"]
    assert copy.read_text() == done.stdout


def test_an_uncalibrated_spec_is_calibrated_first_and_that_is_said(run: Run) -> None:
    small = ("--calibration-samples", 1, "--calibration-seq-len", 32)
    done = run("ppl", "builtin", "--spec", "int3", *small, *SMALL)
    assert done.exit_code == 0, done.stderr
    assert "calibrating int3 on 1 windows of 32 from builtin:calibration" in done.stderr


def test_a_missed_gate_prints_the_result_and_a_line_each(run: Run, bundle: Path) -> None:
    gates = ("--max-ppl-ratio", 0.5, "--max-kld", 0, "--min-compression", 100)
    done = run("ppl", "builtin", "--bundle", bundle, *SMALL, *gates, "--json", "-q")
    assert done.exit_code == 1
    result = json.loads(done.stdout)["result"]
    ratio, kld, compression = done.stderr.splitlines()
    assert (
        ratio == f"gate not met: ppl_ratio {result['ppl_ratio']:.6g} is above --max-ppl-ratio 0.5"
    )
    assert kld.startswith("gate not met: kld_mean ")
    assert compression.endswith("is below --min-compression 100")


def test_gates_that_hold_are_silent(run: Run, bundle: Path) -> None:
    gates = ("--max-ppl-ratio", 100, "--max-kld", 100, "--min-compression", 0.1)
    done = run("ppl", "builtin", "--bundle", bundle, *SMALL, *gates, "-q")
    assert (done.exit_code, done.stderr) == (0, "")


@pytest.mark.parametrize(("value", "is_met"), [(1.0, True), (1.1, False), (float("nan"), False)])
def test_a_gate_is_inclusive_and_nan_never_passes(value: float, is_met: bool) -> None:
    assert Gate("x", value, "--max-x", 1.0).is_met is is_met
    assert Gate("x", value, "--max-x", None).is_met
    assert Gate("x", -value, "--min-x", -1.0, is_floor=True).is_met is is_met


def test_calibration_text_is_refused_unless_allowed(run: Run, bundle: Path) -> None:
    arguments = ("ppl", "builtin", "--bundle", bundle, *SMALL, "--dataset", "builtin:calibration")
    refused = run(*arguments, "-q")
    assert refused.exit_code == 2
    assert "--allow-calibration-text" in refused.stderr
    assert run(*arguments, "--allow-calibration-text", "-q").exit_code == 0


@pytest.mark.parametrize("protocol", ["true-decode", "prefill-exact"])
def test_other_protocols_are_named_in_the_result(run: Run, protocol: str) -> None:
    small = ("--seq-len", 16, "--windows", 1)
    done = run("ppl", "builtin", "--spec", "int8-g64", *small, "--protocol", protocol, "--json")
    assert json.loads(done.stdout)["result"]["protocol"]["name"] == protocol


def test_fp_changes_nothing(run: Run) -> None:
    done = run("ppl", "builtin", "--spec", "fp", *SMALL, "--json", "-q")
    result = json.loads(done.stdout)["result"]
    assert result["ppl_ratio"] == pytest.approx(1, abs=1e-6)
    assert result["same_top1"] == 1


def test_passkey_prints_a_row_a_length(run: Run, bundle: Path) -> None:
    task = ("--task", "passkey", "--lengths", "150,200", "--trials", 1)
    done = run("ppl", "builtin", "--bundle", bundle, *task, "-q")
    assert done.exit_code == 0, done.stderr
    header, *rows = (line.split("\t") for line in done.stdout.splitlines())
    assert header == ["tokens", "trials", "found", "found_baseline"]
    assert [row[:2] for row in rows] == [["150", "1"], ["200", "1"]]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--lengths", "1024,many"), "--lengths '1024,many' is not numbers of tokens"),
        (("--max-kld", 1), "--max-kld is a gate on perplexity; drop it"),
    ],
)
def test_passkey_refuses_what_it_cannot_use(
    run: Run, bundle: Path, options: tuple[Any, ...], message: str
) -> None:
    done = run("ppl", "builtin", "--bundle", bundle, "--task", "passkey", *options)
    assert done.exit_code == 2
    assert message in done.stderr
