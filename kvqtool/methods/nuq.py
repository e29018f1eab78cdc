"""nuq: KVQuant's non-uniform levels, fitted to what the loss is sensitive to (arXiv 2401.18079).

One codebook per layer and side minimises sum F_ii (A_i - Q(A_i))^2 with the diagonal Fisher
information F_ii = g_i^2 (eq. 1). Clustering happens in normalised space, so an element weighs F_ii
* s_i^2, s_i being half the range of its channel (keys) or token (values) (eq. 7). The fit is the
exact optimum on a histogram, not k-means from random starts.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kvqtool.codebook import as_half, match_moments
from kvqtool.histogram import LevelHistogram
from kvqtool.kmeans import weighted_kmeans
from kvqtool.methods.base import Method
from kvqtool.side import QuantSpec


class NuqMethod(Method):
    """Levels where the Fisher-weighted data is."""

    name = "nuq"
    summary = "non-uniform levels by Fisher-weighted 1-D k-means, solved exactly"
    paper = "https://arxiv.org/abs/2401.18079"

    def fit(self, spec: QuantSpec, histogram: LevelHistogram | None) -> tuple[Tensor, Tensor]:
        """Fit levels to the calibration histogram, and shift the decoded ones where the spec
        matches moments.
        """
        assert histogram is not None, "nuq levels come from calibration"
        fitted = weighted_kmeans(*histogram.weighted(), 1 << spec.bits, histogram.device)
        levels = as_half(torch.from_numpy(fitted))
        decoded = levels
        if spec.moment_match:
            points, counts = histogram.counted()
            decoded = as_half(
                torch.from_numpy(match_moments(points, counts, levels.double().numpy()))
            )
        if spec.channel_levels or histogram.problems > 1:
            return levels, decoded
        return levels[0], decoded[0]
