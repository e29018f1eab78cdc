"""NVRTC without a GPU or CuPy: what pip's nvidia-cuda-nvrtc ships, through ctypes."""

from __future__ import annotations

import ctypes
import re
import sys
from functools import cache
from pathlib import Path

from kvqtool.cuda import Kernel, compile_options, source_text


@cache
def _library() -> ctypes.CDLL | None:
    found = [p for root in sys.path for p in Path(root or ".").glob("nvidia/*/lib/libnvrtc.so.*")]
    if not found:
        return None
    for builtins in found[0].parent.glob("libnvrtc-builtins.so.*"):
        ctypes.CDLL(str(builtins), mode=ctypes.RTLD_GLOBAL)
    return ctypes.CDLL(str(found[0]))


HAS_NVRTC = _library() is not None


def compile_source(kernel: Kernel, architecture: str) -> str:
    """Compile a kernel's source to machine code and return ptxas's report.

    Raises:
        AssertionError: when it does not compile, with the compiler's log.
    """
    library = _library()
    assert library is not None
    program, size = ctypes.c_void_p(), ctypes.c_size_t()
    text = source_text(kernel.source).encode()
    assert not library.nvrtcCreateProgram(ctypes.byref(program), text, b"kernel.cu", 0, None, None)
    options = (f"-arch={architecture}", "--ptxas-options=-v", *compile_options(kernel.macros))
    given = (ctypes.c_char_p * len(options))(*(option.encode() for option in options))
    failed = library.nvrtcCompileProgram(program, len(options), given)
    library.nvrtcGetProgramLogSize(program, ctypes.byref(size))
    log = ctypes.create_string_buffer(size.value)
    library.nvrtcGetProgramLog(program, log)
    library.nvrtcDestroyProgram(ctypes.byref(program))
    assert not failed, log.value.decode()
    return log.value.decode()


def resources(report: str) -> tuple[int, int]:
    """Return the most registers and spilled bytes of a function in ptxas's report."""
    registers = [int(n) for n in re.findall(r"Used (\d+) registers", report)]
    spilled = [int(n) for n in re.findall(r"(\d+) bytes spill", report)]
    return max(registers), max(spilled)
