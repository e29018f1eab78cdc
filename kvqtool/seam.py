"""What is known of a model's attention layers once it has been probed: plain data between probe,
cache and report.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from kvqtool.layers import Angles, CacheLayer
from kvqtool.memory import LayerGeometry
from kvqtool.rope import AngleFormula, Rotation


@dataclass(frozen=True)
class LayerSeam:
    """One cache layer of a model.

    Args:
        index: the cache layer's index.
        geometry: shapes of its states, from the tensors themselves.
        module: the attention module that writes it; None where none was found.
        is_packed: whether kvqtool stores this layer; others keep their stock cache.
        rotation: how its keys are rotated, verified on real keys; None to store keys as they come.
        formula: angles as a function of position; None where the tables themselves must be kept.
        note: what was found, for the report.
        group: layers with the same number share their angles.
        window: tokens a sliding layer's queries see, the newest included; None for all.
        tables: the angles seen by the probe, while groups are being formed.
    """

    index: int
    geometry: LayerGeometry
    module: nn.Module | None
    is_packed: bool
    rotation: Rotation | None
    formula: AngleFormula | None
    note: str
    group: int = 0
    window: int | None = None
    tables: tuple[Tensor, Tensor] | None = None

    def shares_angles_with(self, other: LayerSeam) -> bool:
        """Whether two layers rotate alike and were given the same angles by the probe."""
        if self.rotation != other.rotation or self.tables is None or other.tables is None:
            return False
        return all(
            mine.shape == theirs.shape and torch.equal(mine.cpu(), theirs.cpu())
            for mine, theirs in zip(self.tables, other.tables, strict=True)
        )

    @property
    def cache_layer(self) -> CacheLayer:
        """The layer as planning counts its bytes."""
        angles = None
        if self.rotation is not None:
            is_formula = self.formula is not None
            angles = Angles(str(self.group), self.rotation.width, None if is_formula else 0)
        kind = "sliding" if self.window else "full"
        return CacheLayer(kind, self.geometry, self.window, angles)


@dataclass(frozen=True)
class Seam:
    """All cache layers of a model, by index."""

    layers: tuple[LayerSeam, ...]

    @property
    def packed(self) -> tuple[LayerSeam, ...]:
        """The layers that kvqtool stores."""
        return tuple(layer for layer in self.layers if layer.is_packed)

    @property
    def cache_layers(self) -> dict[int, CacheLayer]:
        """The layers that kvqtool stores, by index, as planning counts their bytes."""
        return {layer.index: layer.cache_layer for layer in self.packed}
