"""Find, compile and launch the CUDA sources of kernels/; the only file that imports CuPy.

Sources lie beside the package's own files in an installed wheel and beside the package in a
checkout (kernels/README.md). A source is handed to NVRTC as one text with its headers inside,
because CuPy's cache of compiled code looks at the text alone.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Final, Protocol

import numpy as np
import torch
from torch import Tensor

from kvqtool.errors import RunError

Macros = tuple[tuple[str, int], ...]
Argument = Tensor | int | float
_STATIC_SHARED: Final = 48 * 1024  # bytes a block may have without asking first
_SHARED_PER_BLOCK: Final = 97  # cudaDevAttrMaxSharedMemoryPerBlockOptin
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


def unavailable(device: torch.device, shared_bytes: int = 0) -> str | None:
    """Return why kernels cannot run on a device, in one sentence, or None where they can.

    Args:
        device: the device.
        shared_bytes: shared memory a block needs.
    """
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
        index = torch.cuda.current_device() if device.index is None else device.index
        room = cupy.cuda.runtime.deviceGetAttribute(_SHARED_PER_BLOCK, index)
    except cupy.cuda.runtime.CUDARuntimeError as error:
        return f"cupy finds no GPU: {error}"
    if shared_bytes > room:
        return f"the kernel needs {shared_bytes} bytes of shared memory, this GPU has {room}"
    return None


def library_versions(device: torch.device) -> dict[str, str | None]:
    """Return the versions of cupy, NVRTC and the driver's CUDA, and the bytes of shared memory a
    block of a CUDA device may have; None for what is not there.
    """
    found: dict[str, str | None] = dict.fromkeys(("cupy", "nvrtc", "driver", "shared_bytes"))
    try:
        import cupy
    except ImportError:
        return found
    found["cupy"] = cupy.__version__
    try:
        found["nvrtc"] = ".".join(map(str, cupy.cuda.nvrtc.getVersion()))
        number = cupy.cuda.runtime.driverGetVersion()
        found["driver"] = f"{number // 1000}.{number % 1000 // 10}"
        if device.type == "cuda":  # torch may know no GPU where cupy is
            index = torch.cuda.current_device() if device.index is None else device.index
            shared = cupy.cuda.runtime.deviceGetAttribute(_SHARED_PER_BLOCK, index)
            found["shared_bytes"] = str(shared)
    except (ImportError, RuntimeError):  # no library or no GPU: the fields that follow stay None
        pass
    return found


@dataclass(frozen=True)
class Kernel:
    """A specialised function: kernels/`source`.cu, `function` in it, and its macros."""

    source: str
    function: str
    macros: Macros


class Launcher(Protocol):
    """What runs a kernel: the GPU, or in tests the same sources compiled for the CPU."""

    def __call__(
        self, kernel: Kernel, shape: tuple[int, int, int], arguments: Sequence[Argument]
    ) -> None:
        """Run `kernel` in `shape`: blocks, threads of a block, bytes of dynamic shared memory."""


@cache
def load_kernel(kernel: Kernel, shared_bytes: int, device_index: int) -> Any:
    """Compile a kernel for a device and return CuPy's `Function`.

    Args:
        kernel: which.
        shared_bytes: dynamic shared memory a block may ask for.
        device_index: the GPU.

    Raises:
        RunError: when CuPy is missing, or the source does not compile.
    """
    reason = unavailable(torch.device("cuda", device_index), shared_bytes)
    if reason:
        raise RunError(reason)
    import cupy

    options = compile_options(kernel.macros)
    with cupy.cuda.Device(device_index):
        module = cupy.RawModule(code=source_text(kernel.source), options=options)
        try:
            function = module.get_function(kernel.function)
        except cupy.cuda.compiler.CompileException as error:
            first = str(error).strip().splitlines()[0]
            raise RunError(f"kernels/{kernel.source}.cu {dict(kernel.macros)}: {first}") from error
        if shared_bytes > _STATIC_SHARED:
            function.max_dynamic_shared_size_bytes = shared_bytes
        return function.kernel  # launched with less ado than the wrapper around it


def run_on_gpu(kernel: Kernel, shape: tuple[int, int, int], arguments: Sequence[Argument]) -> None:
    """Launch a kernel on torch's current stream of the tensors' device.

    Args:
        kernel: which.
        shape: blocks, threads of a block, bytes of dynamic shared memory.
        arguments: tensors are passed as pointers, integers as 32 bits, floats as 32 bits.
    """
    device = next(a for a in arguments if isinstance(a, Tensor)).device
    if device.type != "cuda":
        raise RunError(f"the kernels run on CUDA devices, not on {device.type}")
    function = load_kernel(kernel, shape[2], device.index)
    stream = _stream_at(torch.cuda.current_stream(device).cuda_stream)
    passed = [a.data_ptr() if isinstance(a, Tensor) else _number(a) for a in arguments]
    if device.index == torch.cuda.current_device():
        function((shape[0],), (shape[1],), passed, shape[2], stream)
        return
    with torch.cuda.device(device):
        function((shape[0],), (shape[1],), passed, shape[2], stream)


@dataclass(frozen=True)
class _Stream:
    """A stream of torch's by the CUDA stream protocol, which CuPy takes."""

    pointer: int

    def __cuda_stream__(self) -> tuple[int, int]:
        """Return the protocol's version and the stream."""
        return 0, self.pointer


@cache
def _stream_at(pointer: int) -> Any:
    """Return CuPy's view of a stream; which one is current is asked at every launch."""
    import cupy

    return cupy.cuda.Stream.from_external(_Stream(pointer))


def _number(argument: float) -> int | np.float32:
    """Return a number as CuPy passes it: 8 bytes of an integer, of which a kernel reads 4."""
    return argument if isinstance(argument, int) else np.float32(argument)
