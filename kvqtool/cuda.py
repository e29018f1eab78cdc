"""Find, compile and launch the CUDA sources of kernels/; the only file that imports CuPy.

Sources lie beside the package's own files in an installed wheel and beside the package in a
checkout (kernels/README.md). A source is handed to NVRTC as one text with its headers inside,
because CuPy's cache of compiled code looks at the text alone.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kvqtool.errors import RunError

Macros = tuple[tuple[str, int], ...]
_INCLUDE = re.compile(r'^#include "(\w+\.cuh)"$', re.MULTILINE)


def kernel_folder() -> Path:
    """Return the folder of the CUDA sources."""
    package = Path(__file__).parent
    installed = package / "_kernels"
    return installed if installed.is_dir() else package.parent / "kernels"


@cache
def source_text(name: str) -> str:
    """Return kernels/`name`.cu with every header it includes in place, each once."""
    folder, seen = kernel_folder(), set()

    def expand(file: str) -> str:
        if file in seen:
            return ""
        seen.add(file)
        text = (folder / file).read_text(encoding="utf-8").replace("#pragma once\n", "")
        return _INCLUDE.sub(lambda found: expand(found[1]), text)

    return expand(f"{name}.cu")


def compile_options(macros: Macros) -> tuple[str, ...]:
    """Return the compiler's options beside the architecture."""
    return ("-std=c++17", *(f"-D{name}={value}" for name, value in macros))


def unavailable(device: torch.device) -> str | None:
    """Return why kernels cannot run on a device, in one sentence, or None where they can."""
    if device.type != "cuda":
        return f"the kernels run on CUDA devices, not on {device.type}"
    try:
        import cupy
    except ImportError:
        return "cupy is not installed; install kvqtool[cuda12] or kvqtool[cuda13]"
    capability = torch.cuda.get_device_capability(device)
    if capability < (8, 0):
        return f"the kernels need compute capability 8.0, this GPU has {capability}"
    try:
        cupy.cuda.runtime.getDeviceCount()
    except cupy.cuda.runtime.CUDARuntimeError as error:
        return f"cupy finds no GPU: {error}"
    return None


@cache
def load_kernel(name: str, macros: Macros, shared_bytes: int, device_index: int) -> Any:
    """Compile kernels/`name`.cu for a device and return its function `name`.

    Args:
        name: the file and the function in it.
        macros: what specialises it.
        shared_bytes: dynamic shared memory a block may ask for.
        device_index: the GPU.

    Raises:
        RunError: when CuPy is missing, or the source does not compile.
    """
    reason = unavailable(torch.device("cuda", device_index))
    if reason:
        raise RunError(reason)
    import cupy

    with cupy.cuda.Device(device_index):
        module = cupy.RawModule(code=source_text(name), options=compile_options(macros))
        try:
            kernel = module.get_function(name)
        except cupy.cuda.compiler.CompileException as error:
            first = str(error).strip().splitlines()[0]
            raise RunError(f"kernels/{name}.cu with {dict(macros)}: {first}") from error
        if shared_bytes > 48 * 1024:
            kernel.max_dynamic_shared_size_bytes = shared_bytes
    return kernel


def launch(
    kernel: Any, shape: tuple[int, int, int], arguments: Sequence[Tensor | int | float]
) -> None:
    """Launch a kernel on torch's current stream of the tensors' device.

    Args:
        kernel: what `load_kernel` returned.
        shape: blocks, threads of a block, bytes of dynamic shared memory.
        arguments: tensors are passed as pointers, integers as 32 bits, floats as 32 bits.
    """
    import cupy

    device = next(a for a in arguments if isinstance(a, Tensor)).device
    stream = torch.cuda.current_stream(device)
    with cupy.cuda.Device(device.index), cupy.cuda.ExternalStream(stream.cuda_stream):
        kernel(
            (shape[0],),
            (shape[1],),
            tuple(_passed(a) for a in arguments),
            shared_mem=shape[2],
        )


def _passed(argument: Tensor | int | float) -> np.generic:
    if isinstance(argument, Tensor):
        return np.uint64(argument.data_ptr())
    return np.uint32(argument) if isinstance(argument, int) else np.float32(argument)
