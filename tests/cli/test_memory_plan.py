"""memory-plan: a row per spec, a gate on the memory."""

import json
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path

import pytest
from typer.testing import Result

from kvqtool.cli.memory_plan import SPECS
from kvqtool.plan import MemoryPlan, plan
from kvqtool.shape import read_shape
from kvqtool.spec import parse_spec

Run = Callable[..., Result]


def test_piped_rows_are_the_plans(run: Run) -> None:
    done = run("memory-plan", "builtin", "--context", 1000)
    assert done.exit_code == 0
    header, *rows = [line.split("\t") for line in done.stdout.splitlines()]
    assert [row[0] for row in rows] == list(SPECS)
    assert all(len(row) == len(header) for row in rows)
    for row in rows:
        cells = dict(zip(header, row, strict=True))
        made = plan(read_shape("builtin"), parse_spec(cells["spec"]), 1000, 1, "auto", None)
        assert int(cells["cache_bytes"]) == made.cache_bytes
        assert float(cells["effective_bits"]) == made.effective_bits
        assert cells["fits"] == cells["gpu_memory_bytes"] == ""


def test_context_defaults_to_the_models(run: Run) -> None:
    rows = json.loads(run("memory-plan", "builtin", "--json").stdout)["result"]["rows"]
    assert {row["context"] for row in rows} == {read_shape("builtin").max_context}


@pytest.mark.parametrize("specs", [["fp"], ["fp", "int4-g64"]])
def test_json_has_the_same_shape_for_one_spec_and_several(run: Run, specs: list[str]) -> None:
    chosen = [word for spec in specs for word in ("--spec", spec)]
    done = run("memory-plan", "builtin", *chosen, "--json", "-q")
    said = json.loads(done.stdout)
    assert done.stderr == ""
    assert said["command"] == "memory-plan"
    assert said["model"] == "builtin"
    assert said["spec"] == ("fp" if len(specs) == 1 else None)
    rows = said["result"]["rows"]
    assert [row["spec"] for row in rows] == specs
    assert set(rows[0]) == {field.name for field in fields(MemoryPlan)}


def test_the_gate_fails_only_when_no_spec_fits(run: Run) -> None:
    tight = run("memory-plan", "builtin", "--gpu-memory", "12MB", "-q")
    assert tight.exit_code == 0
    none = run("memory-plan", "builtin", "--gpu-memory", "10MiB", "--json", "-q")
    assert none.exit_code == 1
    assert {row["fits"] for row in json.loads(none.stdout)["result"]["rows"]} == {False}
    assert none.stderr.startswith("gate not met: total_bytes ")
    assert none.stderr.endswith("above --gpu-memory 10485760\n")
    assert none.stderr.count("\n") == 1


def test_assumptions_are_said_on_stderr(run: Run) -> None:
    done = run("memory-plan", "builtin", "--spec", "nuq3-1%", "--context", 9999)
    assert "activations" in done.stderr
    assert "beyond the 4096 tokens" in done.stderr


def test_the_copy_is_written_and_not_overwritten(run: Run, tmp_path: Path) -> None:
    path = tmp_path / "plan.tsv"
    done = run("memory-plan", "builtin", "-o", path)
    assert path.read_text() == done.stdout
    again = run("memory-plan", "builtin", "-o", path)
    assert again.exit_code == 2
    assert run("memory-plan", "builtin", "-o", path, "--force").exit_code == 0


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("nowhere",), "download its config.json"),
        (("builtin", "--spec", "nuq5"), "unknown method nuq5"),
        (("builtin", "--spec", "int4-g60"), "do not divide"),
        (("builtin", "--gpu-memory", "80G"), "80GiB"),
    ],
)
def test_bad_input_is_one_line(run: Run, arguments: tuple[str, ...], says: str) -> None:
    done = run("memory-plan", *arguments)
    assert done.exit_code == 2
    assert done.stdout == ""
    assert done.stderr.startswith("error: ")
    assert says in done.stderr
    assert done.stderr.count("\n") == 1
