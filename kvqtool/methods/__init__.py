"""The methods there are. Adding one is its file and its line in METHODS."""

from __future__ import annotations

from typing import Final

from kvqtool.methods.base import ExactMethod, Method
from kvqtool.methods.hadamard_int import HadamardMethod
from kvqtool.methods.kivi import KiviMethod
from kvqtool.methods.normalfloat import NormalFloatMethod
from kvqtool.methods.nuq import NuqMethod
from kvqtool.methods.turboquant import TurboQuantMethod
from kvqtool.methods.uniform import UniformMethod

METHODS: Final[tuple[type[Method], ...]] = (
    ExactMethod,
    UniformMethod,
    NormalFloatMethod,
    NuqMethod,
    KiviMethod,
    HadamardMethod,
    TurboQuantMethod,
)


def get_method(name: str) -> Method:
    """Return the method of a spec's `method` field."""
    return next(method() for method in METHODS if method.name == name)
