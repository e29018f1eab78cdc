"""Compile kernels/*.cu for the CPU with g++ and call them; for tests."""

from __future__ import annotations

import ctypes
import hashlib
import os
import re
import shutil
import struct
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import pytest
from torch import Tensor

from kvqtool.cuda import Argument, Kernel, Macros, source_text

FOLDER = Path(__file__).parent
HAS_COMPILER = shutil.which("g++") is not None
_CHECKED = "KVQTOOL_SHIM_CHECKED"  # set where every access is checked
_MAIN = '#include <type_traits>\n#include <utility>\n#include "launch.hpp"\n'
_FUNCTION = re.compile(r"^KERNEL(?:_OF)?\(.*\)\n(\w+)\(", re.MULTILINE)


@cache
def _library(source: str, macros: Macros) -> ctypes.CDLL:
    """Return all functions of a source, compiled at once."""
    text = source_text(source)
    text += _MAIN + "".join(f"LAUNCHER({name})\n" for name in _FUNCTION.findall(text))
    options = ["-std=c++20", "-O1", "-shared", "-fPIC", "-DKVQ_HOST", "-ffp-contract=off"]
    if _CHECKED in os.environ:
        options += ["-fsanitize=address", "-g1"]
    options += [f"-D{key}={value}" for key, value in macros]
    headers = "".join(p.read_text(encoding="utf-8") for p in sorted(FOLDER.glob("*.hpp")))
    digest = hashlib.sha256("\0".join([text, headers, *options]).encode()).hexdigest()[:20]
    built = Path(tempfile.gettempdir()) / f"kvqtool-shim-{digest}.so"
    if not built.exists():
        fresh = built.with_suffix(f".{os.getpid()}.tmp")
        command = ["g++", *options, "-I", str(FOLDER), "-x", "c++", "-", "-o", str(fresh)]
        done = subprocess.run(command, input=text, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[:4000]
        fresh.replace(built)
    return ctypes.CDLL(str(built))


def run_on_cpu(kernel: Kernel, shape: tuple[int, int, int], arguments: Sequence[Argument]) -> None:
    """Run a kernel on CPU tensors: (blocks, threads, shared bytes), then its arguments."""
    slots = (ctypes.c_uint64 * len(arguments))()
    for i, argument in enumerate(arguments):
        if isinstance(argument, Tensor):
            slots[i] = argument.data_ptr()
        elif isinstance(argument, int):
            slots[i] = argument
        else:
            slots[i] = struct.unpack("<I", struct.pack("<f", argument))[0]
    getattr(_library(kernel.source, kernel.macros), f"launch_{kernel.function}")(*shape, slots)


def run_checked(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run Python where a kernel that leaves a tensor or its shared memory ends the process."""
    asked = ["g++", "-print-file-name=libasan.so"]
    runtime = subprocess.run(asked, capture_output=True, text=True, check=True).stdout.strip()
    options = {"LD_PRELOAD": runtime, "ASAN_OPTIONS": "detect_leaks=0", _CHECKED: "1"}
    command = [sys.executable, *arguments]
    return subprocess.run(command, env=os.environ | options, capture_output=True, text=True)


def mostly_slow(quick: Sequence[object], cases: Sequence[object]) -> list[object]:
    """Return cases for parametrize: `quick` ones always run, the rest with -m slow only."""
    return [c if c in quick else pytest.param(c, marks=pytest.mark.slow) for c in cases]
