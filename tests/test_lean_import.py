"""What needs no tensors loads none: the package, help and the planner start quickly."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
HEAVY = ("torch", "transformers", "numpy", "cupy", "datasets", "safetensors")
PACKAGE = "import kvqtool"
COMMAND = """
import sys
sys.argv[1:] = {arguments}
from kvqtool.cli import main
try:
    main()
except SystemExit as stop:
    assert not stop.code, stop.code
"""
REPORT = f"""
import sys
sys.stderr.write("loaded:" + ",".join(m for m in {HEAVY} if m in sys.modules))
"""


def loaded_by(code: str, folder: Path) -> str:
    """Run code in a fresh interpreter and return the heavy modules it left loaded."""
    done = subprocess.run(
        [sys.executable, "-c", code + REPORT],
        capture_output=True,
        text=True,
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 0, done.stderr
    return done.stderr.rpartition("loaded:")[2]


def test_the_probe_sees_heavy_modules(tmp_path: Path) -> None:
    assert loaded_by("import safetensors", tmp_path) == "safetensors"


def test_importing_the_package_is_light(tmp_path: Path) -> None:
    assert loaded_by(PACKAGE, tmp_path) == ""


@pytest.mark.parametrize(
    "arguments",
    [
        ["--help"],
        ["--version"],
        ["ppl", "--help"],
        ["memory-plan", "builtin"],
        ["memory-plan", "builtin", "--json"],
        [
            "memory-plan",
            "gemma-3-27b",
            "--gpu",
            "h100",
            "--context",
            "4096",
            "--tp",
            "2",
            "--explain",
        ],
    ],
    ids=" ".join,
)
def test_commands_without_tensors_are_light(tmp_path: Path, arguments: list[str]) -> None:
    assert loaded_by(COMMAND.format(arguments=arguments), tmp_path) == ""


def test_importing_every_module_has_no_side_effects(tmp_path: Path) -> None:
    modules = sorted(
        ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        for path in (ROOT / "kvqtool").rglob("*.py")
        if path.stem != "__main__"
    )
    code = f"""
import os
import torch, transformers, numpy
def environment():  # torch itself names its compiler's cache folder while transformers loads
    return {{k: v for k, v in os.environ.items() if k != "TORCHINDUCTOR_CACHE_DIR"}}
before = environment(), torch.get_rng_state(), torch.get_num_threads(), os.listdir()
import importlib
for name in {modules}:
    importlib.import_module(name)
assert environment() == before[0], "environment"
assert torch.get_rng_state().equal(before[1]), "random state"
assert torch.get_num_threads() == before[2], "threads"
assert os.listdir() == before[3], "files"
assert not torch.cuda.is_initialized(), "CUDA context"
"""
    loaded_by(code, tmp_path)


def test_the_module_runs_as_a_program(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "kvqtool", "--help"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 0
    assert "memory-plan" in done.stdout
