"""Method: the contract of a quantization method, and the plumbing that every method of levels
shares.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

import torch
from torch import Tensor

from kvqtool.codebook import Codebook
from kvqtool.codec import decode, encode
from kvqtool.histogram import LevelHistogram
from kvqtool.side import QuantSpec


class Method(ABC):
    """How levels are chosen; storage, outliers and ranges follow from the spec and are the same for
    all.

    A method is one file with one subclass, and one entry in `methods.METHODS`.
    """

    name: ClassVar[str]
    summary: ClassVar[str]
    paper: ClassVar[str]

    @abstractmethod
    def fit(self, spec: QuantSpec, histogram: LevelHistogram | None) -> tuple[Tensor, Tensor]:
        """Choose levels.

        Args:
            spec: the side's scheme.
            histogram: what calibration saw; None where the spec needs no calibration.

        Returns:
            Levels to encode by and levels to decode to, each (L,), or of a histogram of several
            problems (problems, L); float32, ascending, fp16 values.
        """

    def quantize(self, states: Tensor, codebook: Codebook, spec: QuantSpec) -> dict[str, Tensor]:
        """Encode rows, (rows, channels) float32, into the buffers of `memory.body_buffers`."""
        return encode(states, codebook, spec)

    def dequantize(
        self, buffers: dict[str, Tensor], codebook: Codebook, spec: QuantSpec, channels: int
    ) -> Tensor:
        """Decode buffers into rows, (rows, channels) float32."""
        return decode(buffers, codebook, spec, channels)


class ExactMethod(Method):
    """fp: the states themselves, in the dtype they came in; the control every other method is held
    against.
    """

    name = "fp"
    summary = "no quantization; the control"
    paper = ""

    def fit(self, spec: QuantSpec, histogram: LevelHistogram | None) -> tuple[Tensor, Tensor]:
        """Return empty levels: there are no codes."""
        return torch.empty(0), torch.empty(0)

    def quantize(self, states: Tensor, codebook: Codebook, spec: QuantSpec) -> dict[str, Tensor]:
        """Keep the rows as they are."""
        return {"states": states}

    def dequantize(
        self, buffers: dict[str, Tensor], codebook: Codebook, spec: QuantSpec, channels: int
    ) -> Tensor:
        """Return the rows in float32."""
        return buffers["states"].float()
