"""Documentation that cannot go stale: generated pages, documented keys, examples that run."""

import dataclasses
import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from kvqtool.cli import COMMANDS, app
from kvqtool.side import METHOD_BITS
from kvqtool.words import FLAGS as MODIFIERS

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
TINY = {"SAMPLES": "2", "SEQ_LEN": "128", "WINDOWS": "2"}
RESULTS = {
    "ppl": "kvqtool.perplexity.PplResult",
    "quantize-cache": "kvqtool.cachefile.CacheReport",
    "generate": "kvqtool.generation.GenerationResult",
    "doctor": "kvqtool.doctor.DoctorReport",
    "memory-plan": "kvqtool.plan.MemoryPlan",
}


def section(page: str, heading: str) -> str:
    """Return the text under a `## heading` of a page."""
    found = re.search(rf"^## {heading}$(.*?)(?=^## |\Z)", page, flags=re.M | re.S)
    assert found is not None, heading
    return found[1]


def examples(command: str) -> list[str]:
    """Return the example lines of a command's help."""
    text = CliRunner().invoke(app, [command, "--help"]).stdout
    lines = text.partition("Examples:")[2].splitlines()
    return [line.strip() for line in lines if line.strip().startswith("kvqtool ")]


@pytest.fixture
def shell(tmp_path: Path) -> Callable[..., "subprocess.CompletedProcess[str]"]:
    """Run a shell script in an empty folder, with this checkout's kvqtool on the path."""
    tool = tmp_path / "bin" / "kvqtool"
    tool.parent.mkdir()
    tool.write_text(f'#!/bin/sh\nexec {sys.executable} -m kvqtool "$@"\n')
    tool.chmod(0o755)
    folder = tmp_path / "work"
    folder.mkdir()
    found = (
        f"{tool.parent}{os.pathsep}{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    )
    shared = {**os.environ, "PATH": found, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}

    def call(script: str, **settings: str) -> "subprocess.CompletedProcess[str]":
        return subprocess.run(
            ["bash", "-c", script],
            capture_output=True,
            text=True,
            cwd=folder,
            env={**shared, **settings},
        )

    return call


def test_generated_pages_are_fresh() -> None:
    command = [sys.executable, "docs/generate.py", "--check"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "200"}
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr


def test_every_command_is_documented() -> None:
    page = (DOCS / "cli.md").read_text(encoding="utf-8")
    keys = (DOCS / "json.md").read_text(encoding="utf-8")
    for command in COMMANDS:
        assert f"\n## kvqtool {command}\n" in page
        assert f"\n## {command}\n" in keys


@pytest.mark.parametrize("command", sorted(RESULTS))
def test_every_key_is_documented_once_and_none_is_invented(command: str) -> None:
    module, _, name = RESULTS[command].rpartition(".")
    fields = [field.name for field in dataclasses.fields(getattr(import_module(module), name))]
    page = section((DOCS / "json.md").read_text(encoding="utf-8"), command)
    documented = re.findall(r"^\| `(\w+)` \|", page, flags=re.M)
    assert sorted(documented) == sorted(fields)


def test_the_examples_of_help_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("notes.txt").write_text("A list is a mutable sequence. A tuple is not.\n" * 8)
    for command in COMMANDS:
        lines = examples(command)
        assert len(lines) == 2, command
        for line in lines:
            done = CliRunner().invoke(app, shlex.split(line)[1:])
            assert done.exit_code == 0, (line, done.stderr)
            assert done.stdout, line
            if "--json" in line:
                assert json.loads(done.stdout)["command"] == command


def test_the_ci_pipeline_runs_and_its_gate_closes(
    shell: Callable[..., Any], tmp_path: Path
) -> None:
    page = (DOCS / "ci.md").read_text(encoding="utf-8")
    (script,) = re.findall(r"```bash\n(.*?)```", page, flags=re.S)
    done = shell(script, **TINY)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert "largest context: " in done.stdout
    for done_before in ("calibrate", "ppl"):
        script = script.replace(f"kvqtool {done_before}", f": {done_before}")
    closed = shell(script, **TINY, GPU_MEMORY="10MB")
    assert closed.returncode == 1
    assert closed.stderr.startswith("gate not met: total_bytes")
    kept = json.loads((tmp_path / "work" / "plan.json").read_text())
    assert kept["result"]["rows"][0]["fits"] is False


@pytest.mark.parametrize("name", ["python.md", "add-a-method.md"])
def test_the_python_of_a_page_runs_in_order(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    page = (DOCS / name).read_text(encoding="utf-8")
    session: dict[str, Any] = {"__name__": name}
    for number, block in enumerate(re.findall(r"```python\n(.*?)```", page, flags=re.S), start=1):
        exec(compile(block, f"{name}, block {number}", "exec"), session)
    assert capsys.readouterr().out


def test_every_method_and_modifier_is_documented() -> None:
    page = (DOCS / "methods.md").read_text(encoding="utf-8")
    for method, widths in METHOD_BITS.items():
        assert all(f"`{method}{bits}`" in page for bits in widths)
    table = section(page, "Modifiers")
    documented = re.findall(r"^\| `-(\w+%?)`", table, flags=re.M)
    assert sorted(documented) == sorted(
        [*MODIFIERS, "F%", "gN", "capN", "sinkN", "rN", "kE", "vE", "wN"]
    )


@pytest.mark.parametrize(
    "page", sorted([*DOCS.glob("*.md"), ROOT / "README.md"]), ids=lambda path: path.name
)
def test_links_between_pages_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#\s]+)", page.read_text(encoding="utf-8")):
        if "://" not in target:
            assert (page.parent / target).exists(), target


def test_the_architecture_page_lists_every_file_of_the_package() -> None:
    page = (DOCS / "architecture.md").read_text(encoding="utf-8")
    listed = re.findall(r"^(?:    )?(\S+\.py) ", section(page, "Files"), flags=re.M)
    package = ROOT / "kvqtool"
    flat = [path.name for path in package.glob("*.py")]
    folders = [path.name for path in package.glob("*/*.py")]
    assert sorted(listed) == sorted(flat + folders)


def test_the_readme_lists_the_same_files_as_the_architecture_page() -> None:
    page = section((DOCS / "architecture.md").read_text(encoding="utf-8"), "Files")
    listing = [line for line in page.splitlines() if line.startswith("    ")]
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert listing
    assert "\n".join(listing) in readme


@pytest.mark.parametrize("page", ["README.md", "docs/quickstart.md"])
def test_the_commands_of_a_page_run(
    page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("document.txt").write_text("A list is a mutable sequence. A tuple is not.\n" * 8)
    smaller = {"calibrate": "--samples 2 --seq-len 128", "ppl": "--seq-len 128 --windows 2"}
    text = (ROOT / page).read_text(encoding="utf-8")
    lines = re.findall(r"^(?:\$ )?(kvqtool .*)$", text, flags=re.M)
    assert [line.split()[1] for line in lines] == list(COMMANDS)
    for line in lines:
        command = shlex.split(re.sub(r" --(samples|seq-len|windows) \d+", "", line))[1:]
        done = CliRunner().invoke(app, [*command, *smaller.get(command[0], "").split()])
        assert done.exit_code == 0, (line, done.stderr)
