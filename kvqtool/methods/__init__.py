"""The methods there are. Adding one is its file and its line in METHODS."""

from __future__ import annotations

from dataclasses import replace
from typing import Final

import torch
from torch import Tensor

from kvqtool.histogram import LevelHistogram
from kvqtool.methods.base import ExactMethod, Method
from kvqtool.methods.hadamard_int import HadamardMethod
from kvqtool.methods.kivi import KiviMethod
from kvqtool.methods.normalfloat import NormalFloatMethod
from kvqtool.methods.nuq import NuqMethod
from kvqtool.methods.qaq import QaqMethod
from kvqtool.methods.turboquant import TurboQuantMethod
from kvqtool.methods.uniform import UniformMethod
from kvqtool.side import WIDTHS, QuantSpec

METHODS: Final[tuple[type[Method], ...]] = (
    ExactMethod,
    UniformMethod,
    NormalFloatMethod,
    NuqMethod,
    KiviMethod,
    HadamardMethod,
    TurboQuantMethod,
    QaqMethod,
)


def get_method(name: str) -> Method:
    """Return the method of a spec's `method` field."""
    return next(method() for method in METHODS if method.name == name)


def fit_widths(spec: QuantSpec, histogram: LevelHistogram | None) -> tuple[Tensor, Tensor]:
    """Return a method's levels for a spec: those of its bits, or where each token has its own,
    those of every one of WIDTHS end to end. Arguments and results are those of `Method.fit`.
    """
    method = get_method(spec.method)
    if not spec.is_adaptive:
        return method.fit(spec, histogram)
    each = [method.fit(replace(spec, bits=width), histogram) for width in WIDTHS]
    return torch.cat([found[0] for found in each], -1), torch.cat([found[1] for found in each], -1)
