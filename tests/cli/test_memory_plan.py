"""memory-plan: a row per spec and context, a gate on the memory, and three other views."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from torches import needs_grouped_sdpa
from typer.testing import Result

from kvqtool import hub
from kvqtool.cli.memory_plan import SPECS
from kvqtool.load import Workload
from kvqtool.plan import MemoryPlan, plan
from kvqtool.shape import read_shape
from kvqtool.spec import parse_spec

Run = Callable[..., Result]
ROOT = Path(hub.__file__).parents[1]
CONFIG = ROOT / "kvqtool" / "builtin" / "config.json"


def result_of(done: Result) -> Any:
    return json.loads(done.stdout)["result"]


def test_piped_rows_are_the_plans(run: Run) -> None:
    done = run("memory-plan", "builtin", "--context", 1000)
    assert done.exit_code == 0
    header, *rows = [line.split("\t") for line in done.stdout.splitlines()]
    assert [row[0] for row in rows] == list(SPECS)
    assert all(len(row) == len(header) for row in rows)
    for row in rows:
        cells = dict(zip(header, row, strict=True))
        made = plan(read_shape("builtin"), parse_spec(cells["spec"]), Workload(1000))
        assert int(cells["cache_bytes"]) == made.cache_bytes
        assert int(cells["total_bytes"]) == made.total_bytes
        assert float(cells["effective_bits"]) == made.effective_bits
        assert cells["fits"] == cells["gpu_memory_bytes"] == ""


def test_context_defaults_to_the_models(run: Run) -> None:
    rows = result_of(run("memory-plan", "builtin", "--json"))["rows"]
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
    assert said["result"]["best_spec"] is None


def test_specs_and_contexts_make_a_table(run: Run) -> None:
    contexts = ("--context", 1000, "--context", 2000)
    rows = result_of(run("memory-plan", "llama-3.1-8b", *contexts, "--json", "-q"))["rows"]
    assert [(row["spec"], row["context"]) for row in rows] == [
        (spec, context) for spec in SPECS for context in (1000, 2000)
    ]


def test_the_gate_fails_only_when_nothing_fits(run: Run) -> None:
    tight = run("memory-plan", "builtin", "--gpu-memory", "700MiB", "--json")
    assert tight.exit_code == 0
    assert result_of(tight)["best_spec"] == "fp"
    assert "fp gives up least" in tight.stderr
    none = run("memory-plan", "builtin", "--gpu-memory", "10MiB", "--json", "-q")
    assert none.exit_code == 1
    assert {row["fits"] for row in result_of(none)["rows"]} == {False}
    assert none.stderr.startswith("gate not met: total_bytes ")
    assert none.stderr.endswith("above --gpu-memory 10485760\n")
    assert none.stderr.count("\n") == 1


def test_a_gpu_is_a_memory_with_a_name(run: Run) -> None:
    done = run("memory-plan", "llama-3.1-70b", "--gpu", "RTX 4090", "--json", "-q")
    assert done.exit_code == 1
    assert "above --gpu rtx-4090 (25757220864)" in done.stderr
    row = result_of(done)["rows"][0]
    assert row["gpu"] == "rtx-4090"
    assert row["margin_bytes"] < 0
    assert row["decode_tokens_per_second_estimate"] > 0


def test_assumptions_are_said_on_stderr(run: Run) -> None:
    done = run("memory-plan", "builtin", "--spec", "nuq3-1%", "--context", 9999)
    assert "materialise" in done.stderr
    assert "beyond the 4096 tokens" in done.stderr


def test_the_reserve_is_the_users(run: Run) -> None:
    totals = [
        result_of(run("memory-plan", "builtin", "--reserve", size, "--json"))["rows"][0][
            "total_bytes"
        ]
        for size in ("0", "1GiB")
    ]
    assert totals[1] - totals[0] == 1 << 30


def test_explaining_prints_terms_that_sum(run: Run) -> None:
    done = run("memory-plan", "gemma-3-4b", "--spec", "nuq4-1%", "--context", 4096, "--explain")
    header, *lines = [line.split("\t") for line in done.stdout.splitlines()]
    assert header == ["spec", "context", "term", "nbytes", "how"]
    sizes = {line[2]: int(line[3]) for line in lines}
    parts = ("peak", "codebooks", "workspace", "fragmentation", "reserve")
    assert sizes["total"] == sum(sizes[part] for part in parts)
    assert any("29 sliding layers of window 1024" in line[4] for line in lines)


def test_measuring_the_cache_finds_the_planned_bytes(run: Run) -> None:
    options = ("--context", 700, "--batch", 2, "--measure", "cache", "--device", "cpu")
    done = run("memory-plan", "builtin", "--spec", "nuq3-1%-sink1", *options, "--json", "-q")
    expected, found = result_of(done)["measured"]
    assert found["planned_bytes"] == found["measured_bytes"]
    assert abs(expected["error"]) < 0.02


@needs_grouped_sdpa
def test_measuring_a_forward_finds_the_planned_peaks(run: Run) -> None:
    options = ("--context", 500, "--prefill-chunk", 128, "--measure", "forward", "--device", "cpu")
    done = run("memory-plan", "builtin", "--spec", "int4-g32", *options, "--json", "-q")
    assert done.exit_code == 0, done.stderr
    errors = {row["name"]: row["error"] for row in result_of(done)["measured"]}
    assert errors["weights"] == errors["packed cache, outliers as found"] == 0
    assert abs(errors["decode peak"]) < 0.02 and abs(errors["prefill peak"]) < 0.02


def test_a_bundle_is_planned_from_its_header(run: Run, bundle: Path) -> None:
    done = run("memory-plan", "builtin", "--bundle", bundle, "--json", "-q")
    (row,) = result_of(done)["rows"]
    plain = run("memory-plan", "builtin", "--spec", row["spec"], "--json", "-q")
    (budget,) = result_of(plain)["rows"]
    assert row["spec"] == budget["spec"]
    assert row["cache_bytes"] == pytest.approx(budget["cache_bytes"], rel=0.05)
    other = run("memory-plan", "llama-3.1-8b", "--bundle", bundle)
    assert other.exit_code == 2
    assert "made for 4 cache layers, llama-3.1-8b has 32" in other.stderr


def test_a_hub_model_is_planned_from_its_config_and_headers(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = Path(hub.__file__).parent / "builtin"
    tensors = {"model.norm.weight": {"dtype": "BF16", "shape": [256], "data_offsets": (0, 512)}}
    monkeypatch.setattr(hub, "fetch_config", lambda name, revision: folder / "config.json")
    monkeypatch.setattr(hub, "fetch_headers", lambda name, revision: [(Path("a"), tensors)])
    (row,) = result_of(run("memory-plan", "owner/model", "--spec", "fp", "--json", "-q"))["rows"]
    assert row["weights_bytes"] == 512


def test_a_hub_model_out_of_reach_is_one_line(run: Run) -> None:
    done = run("memory-plan", "owner/no-such-model")
    assert done.exit_code == 2
    assert "'owner/no-such-model'" in done.stderr and "name a folder" in done.stderr
    assert done.stderr.count("\n") == 1


def test_weights_of_the_hub_out_of_reach_are_one_line(tmp_path: Path) -> None:
    """The config may be cached where the network is gone; nothing listens on port 9."""
    script = (
        "import pathlib, kvqtool.hub, kvqtool.cli, sys\n"
        f"kvqtool.hub.fetch_config = lambda *_: pathlib.Path({str(CONFIG)!r})\n"
        "sys.argv = ['kvqtool', 'memory-plan', 'owner/model']\n"
        "kvqtool.cli.main()\n"
    )
    place = {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(tmp_path), "PYTHONPATH": str(ROOT)}
    environment = {k: v for k, v in os.environ.items() if k != "HF_HUB_OFFLINE"} | place
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 2, done.stderr
    assert "plan without them: --weights none" in done.stderr
    assert done.stderr.count("\n") == 1


def test_unknown_weights_are_refused_where_a_verdict_is_asked_for(run: Run, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(CONFIG.read_text())
    assert run("memory-plan", tmp_path).exit_code == 0
    done = run("memory-plan", tmp_path, "--gpu", "h100")
    assert done.exit_code == 2
    assert "--weights none" in done.stderr and "--weights SIZE" in done.stderr
    assert done.stderr.count("\n") == 1
    assert run("memory-plan", tmp_path, "--gpu", "h100", "--weights", "none").exit_code == 0


def test_plotting_needs_matplotlib_and_says_so(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    done = run("memory-plan", "builtin", "--plot", tmp_path / "plan.png", "-q")
    assert done.exit_code == 2
    assert done.stderr.endswith("install it: pip install 'kvqtool[plot]'\n")


def test_a_plot_is_drawn(run: Run, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="the plot extra is not installed")
    path = tmp_path / "plan.svg"
    done = run("memory-plan", "llama-3.1-8b", "--gpu", "h100", "--plot", path, "-q")
    assert done.exit_code == 0, done.stderr
    drawn = path.read_text()
    assert "h100: 79.6 GiB" in drawn
    assert all(f">{spec}<" in drawn or f"<!-- {spec} -->" in drawn for spec in SPECS)
    bad = run("memory-plan", "llama-3.1-8b", "--plot", tmp_path / "plan.txt", "-q")
    assert bad.exit_code == 2 and "is no picture" in bad.stderr


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
        (("builtin", "--gpu", "voodoo2"), "not in the catalog"),
        (("builtin", "--weights", "lots"), "80GiB"),
        (("builtin", "--tp", 3), "--tp 3 does not divide"),
        (("builtin", "--bundle", "none.safetensors"), "does not exist"),
        (("builtin", "--tp", 2, "--measure", "cache"), "drop --tp, --pp and --context-parallel"),
        (
            ("builtin", "--read-path", "fused"),
            "keys stored as fp; name what kernels read by --spec",
        ),
        (
            ("builtin", "--spec", "nuq3", "--read-path", "fused", "--measure", "cache"),
            "drop --read-path",
        ),
        (
            ("builtin", "--context", 300, "--context-parallel", 3),
            "300 tokens has 2 whole pages of 128, too few for 3 processes",
        ),
        (("jamba-1.5", "--context", 9), "no config of model"),
    ],
)
def test_bad_input_is_one_line(run: Run, arguments: tuple[str, ...], says: str) -> None:
    done = run("memory-plan", *arguments)
    assert done.exit_code == 2
    assert done.stdout == ""
    assert done.stderr.startswith("error: ")
    assert says in done.stderr
    assert done.stderr.count("\n") == 1


def test_an_unknown_architecture_is_refused_by_name(run: Run, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "perceiver-9"}')
    done = run("memory-plan", tmp_path)
    assert done.exit_code == 2
    assert "'perceiver-9' cannot be planned" in done.stderr
