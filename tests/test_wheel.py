"""The wheel: built from the sdist, installed where no checkout is near, it has all it needs."""

import os
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[1]
ENTRY = "kvqtool.exe" if os.name == "nt" else "kvqtool"


def call(*command: object, folder: Path) -> str:
    """Run a command without this checkout's environment and return what it prints."""
    hidden = ("PYTHONPATH", "VIRTUAL_ENV", "PYTHONHOME")
    environment = {k: v for k, v in os.environ.items() if k not in hidden}
    done = subprocess.run(
        [str(part) for part in command], capture_output=True, text=True, cwd=folder, env=environment
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def files_under(folder: Path) -> set[str]:
    """Return the relative names of the files git would keep under a folder."""
    found = (path for path in folder.rglob("*") if path.is_file())
    return {p.relative_to(folder).as_posix() for p in found if "__pycache__" not in p.parts}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build the sdist, and the wheel from it; `build` does so in this order by default."""
    folder = tmp_path_factory.mktemp("dist")
    call(sys.executable, "-m", "build", "--no-isolation", "--outdir", folder, ROOT, folder=folder)
    (built,) = folder.glob("*.whl")
    assert len(list(folder.glob("*.tar.gz"))) == 1
    return built


@pytest.fixture(scope="module")
def python(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Install the wheel into a new environment that borrows this one's dependencies."""
    folder = tmp_path_factory.mktemp("clean")
    venv.create(folder / "venv", with_pip=False)
    scripts = folder / "venv" / ("Scripts" if os.name == "nt" else "bin")
    python = scripts / ("python.exe" if os.name == "nt" else "python")
    pip = (sys.executable, "-m", "pip", "--disable-pip-version-check", "--python", python)
    call(*pip, "install", "--quiet", "--no-index", "--no-deps", wheel, folder=folder)
    purelib = call(
        python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", folder=folder
    )
    # Read after the environment's own packages, and without .pth files: an editable kvqtool in the
    # borrowed folder stays invisible.
    borrowed = Path(purelib.strip()) / "borrowed.pth"
    borrowed.write_text(sysconfig.get_path("purelib") + "\n", encoding="utf-8")
    return python


@pytest.mark.parametrize(
    ("source", "target"), [("kernels", "kvqtool/_kernels"), ("kvqtool", "kvqtool")]
)
def test_the_wheel_carries_every_file(wheel: Path, source: str, target: str) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    missing = {f"{target}/{name}" for name in files_under(ROOT / source)} - names
    assert not missing


def test_the_wheel_carries_nothing_else(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0].split("-")[0] for name in names} == {"kvqtool"}
    assert not [name for name in names if "__pycache__" in name]


def test_the_installed_package_is_the_wheels(python: Path, tmp_path: Path) -> None:
    where = call(python, "-c", "import kvqtool; print(kvqtool.__file__)", folder=tmp_path)
    assert Path(where.strip()).is_relative_to(python.parents[1])


def test_kernels_lie_beside_the_installed_code(python: Path, tmp_path: Path) -> None:
    code = """
from pathlib import Path
import kvqtool
folder = Path(kvqtool.__file__).parent / "_kernels"
print(*sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()))
"""
    assert set(call(python, "-c", code, folder=tmp_path).split()) == files_under(ROOT / "kernels")


def test_the_installed_command_plans_memory(python: Path, tmp_path: Path) -> None:
    printed = call(python.parent / ENTRY, "memory-plan", "builtin", folder=tmp_path)
    assert "kvq3" in printed


def test_the_installed_model_loads_and_predicts(python: Path, tmp_path: Path) -> None:
    code = """
import torch
from kvqtool.models import load_model
loaded = load_model("builtin", device="cpu")
ids = torch.tensor([loaded.tokenizer("The list type is")["input_ids"]])
print(loaded.model(ids).logits.isfinite().all().item())
"""
    assert call(python, "-c", code, folder=tmp_path).split() == ["True"]
