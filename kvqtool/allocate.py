"""Spend a budget of bytes where the loss feels it: bits and outliers of every layer's keys and
values.

No forward pass is needed. A rounding error e of one token costs e^T H e / 2 nats, with H the Fisher
information that calibration has summed, so every option of every layer and side has a predicted
Kullback-Leibler divergence; compensated rounding leaves a known share of it. How errors of layers
meet is what predictions do not know and `search` measures.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Final

from kvqtool.fit import Fitter
from kvqtool.layers import CacheLayer, CacheModel
from kvqtool.memory import Outliers, part_buffers
from kvqtool.side import METHOD_BITS, QuantSpec
from kvqtool.spec import SIDES, KvSpec

# Outlier shares an option may have, in shares of the scheme's own. More key outliers would need a
# third histogram of every key channel.
_SHARES: Final = {"key": (0, 1), "value": (0, 1, 2)}
# A budget of bits counts so many times the key outliers that calibration aims at: thresholds from
# an encyclopedia leave 1.4 times as many on novels, 1.53 times in a single window.
OUTLIER_MARGIN: Final = 1.6
# Text of another kind has keys beyond the ranges of the calibration text; without outliers they are
# clipped. So the predicted loss of such keys counts so many times, where the scheme has outliers.
BARE_KEYS: Final = 2.0
# The widest codebooks that predictions are computed for: every bit beyond quarters the loss.
_FITTED_BITS: Final = 4
FITTED: Final = 1 << _FITTED_BITS
Specs = dict[int, KvSpec]
Place = tuple[int, str]  # a layer, and its keys or its values


@dataclass(frozen=True)
class Option:
    """One way to store one side of one layer: its scheme, bytes, and predicted loss in nats a
    position.
    """

    quant: QuantSpec
    nbytes: int
    loss: float


@dataclass(frozen=True)
class Ground:
    """What an allocation is made for.

    Args:
        scheme: what all layers have in common; widths and outlier shares are chosen.
        layers: every packed layer, by index.
        tokens: the context that bytes are counted at, of one sequence.
        dtype: the model's, which sinks and window are kept in.
        key_excess: outliers that keys are counted with, over those that calibration aims at; no
            more than a cap allows.
    """

    scheme: KvSpec
    layers: Mapping[int, CacheLayer]
    tokens: int
    dtype: str
    key_excess: float = 1.0

    @property
    def elements(self) -> int:
        """Numbers that the cache holds at the context: a sliding layer's past is gone."""
        return sum(
            layer.geometry.elements * sum(layer.parts(self.scheme, self.tokens))
            for layer in self.layers.values()
        )

    def nbytes(self, specs: Specs) -> int:
        """Return the bytes of a whole cache at the context."""
        parts = (
            self._bytes(specs[index], layer, lambda name: True)
            for index, layer in self.layers.items()
        )
        angles = CacheModel(tuple(self.layers.values()), self.scheme, 1, self.dtype).angles
        return sum(parts) + sum(each.nbytes(1, self.tokens) for each in angles)

    def bits(self, specs: Specs) -> float:
        """Return effective bits a number at the context, everything included."""
        return 8 * self.nbytes(specs) / self.elements

    def uniform(self, widths: tuple[int, int]) -> Specs:
        """Return the scheme for all layers, keys and values of some widths."""
        key, value = (
            replace(self.scheme.side(side), bits=bits)
            for side, bits in zip(SIDES, widths, strict=True)
        )
        return dict.fromkeys(self.layers, replace(self.scheme, key=key, value=value))

    def side_bytes(self, quant: QuantSpec, place: Place) -> int:
        """Return the bytes of one side of one layer's packed body."""
        index, side = place
        spec = self.scheme.with_side(side, quant)
        return self._bytes(spec, self.layers[index], lambda name: name.startswith(f"{side}."))

    def _bytes(self, spec: KvSpec, layer: CacheLayer, counts: Callable[[str], bool]) -> int:
        parts = layer.parts(spec, self.tokens)
        found, most = (layer.outliers(spec, parts[1], bound=bound) for bound in (False, True))
        keys = min(math.ceil(found.key * self.key_excess), most.key)
        outliers = Outliers(keys, found.value)
        buffers = part_buffers(spec, layer.geometry, 1, parts, outliers, self.dtype)
        return sum(buffer.nbytes for name, buffer in buffers.items() if counts(name))


def variants(scheme: KvSpec) -> list[KvSpec]:
    """Return the schemes that calibration has to observe for every option to be fitted."""
    found = {}
    for number in range(max(map(len, _SHARES.values()))):
        spec = replace(scheme, mixed=False, target_bits=None)
        for side, shares in _SHARES.items():
            share = shares[min(number, len(shares) - 1)]
            spec = spec.with_side(side, _with_share(scheme.side(side), share))
        found[str(spec)] = spec
    return list(found.values())


def options(ground: Ground, fitter: Fitter, positions: int) -> dict[Place, list[Option]]:
    """Return every layer's and side's options worth having, by rising bytes and falling loss.

    Args:
        ground: what the allocation is made for.
        fitter: what calibration on `variants` found.
        positions: tokens that it saw.
    """
    jobs = [
        ((index, side), _with_share(ground.scheme.side(side), share))
        for index in ground.layers
        for side in SIDES
        for share in _SHARES[side]
    ]
    losses = fitter.predict(
        [(ground.scheme.with_side(place[1], quant), place[1], place[0]) for place, quant in jobs],
        FITTED,
    )
    found: dict[Place, list[Option]] = {place: [] for place, _ in jobs}
    for (place, quant), by_levels in zip(jobs, losses, strict=True):
        for bits in METHOD_BITS[quant.method]:
            form = replace(quant, bits=bits)
            loss = loss_of(by_levels, bits, positions) * _risk(ground.scheme, form, place[1])
            found[place].append(Option(form, ground.side_bytes(form, place), loss))
    return {place: _worthwhile(each) for place, each in found.items()}


def _risk(scheme: KvSpec, quant: QuantSpec, side: str) -> float:
    """Return how many times a predicted loss counts, for text of another kind."""
    is_bare = side == "key" and scheme.key.outlier_fraction and not quant.outlier_fraction
    return BARE_KEYS if is_bare else 1.0


def loss_of(errors: Sequence[float], bits: int, positions: int) -> float:
    """Return the predicted loss of a width in nats a position.

    Args:
        errors: by number of levels, as `Fitter.predict` returns them for FITTED levels.
        bits: of a code.
        positions: tokens that calibration saw.
    """
    known = min(bits, _FITTED_BITS)
    return errors[(1 << known) - 1] / 4.0 ** (bits - known) / (2 * positions)


def allocate(
    ground: Ground,
    choices: Mapping[Place, Sequence[Option]],
    budget: int,
    weight: Callable[[Place], float] = lambda place: 1.0,
) -> Specs | None:
    """Choose an option for every layer and side: the least predicted loss within a budget.

    Each step takes what saves most loss a byte among all next options, as long as it fits; on
    convex options that is the optimum for the bytes it ends at.

    Args:
        ground: what the allocation is made for.
        choices: what `options` returned.
        budget: bytes of the whole cache at the context.
        weight: of a place's predicted losses, to correct them by what was measured.

    Returns:
        A scheme a layer; None where not even the smallest options fit.
    """
    taken = dict.fromkeys(choices, 0)
    spent = ground.nbytes(_specs(ground, choices, taken))
    if spent > budget:
        return None
    heap: list[tuple[float, int, Place]] = []

    def offer(number: int, place: Place) -> None:
        at, row = taken[place], choices[place]
        if at + 1 < len(row):
            saved = (row[at].loss - row[at + 1].loss) * weight(place)
            heapq.heappush(heap, (-saved / (row[at + 1].nbytes - row[at].nbytes), number, place))

    for number, place in enumerate(choices):
        offer(number, place)
    while heap:
        _, number, place = heapq.heappop(heap)
        row, at = choices[place], taken[place]
        more = row[at + 1].nbytes - row[at].nbytes
        if spent + more <= budget:
            spent, taken[place] = spent + more, at + 1
            offer(number, place)
    return _specs(ground, choices, taken)


def _specs(
    ground: Ground, choices: Mapping[Place, Sequence[Option]], taken: Mapping[Place, int]
) -> Specs:
    specs = dict.fromkeys(ground.layers, ground.scheme)
    for (index, side), at in taken.items():
        specs[index] = specs[index].with_side(side, choices[index, side][at].quant)
    return specs


def _with_share(quant: QuantSpec, share: int) -> QuantSpec:
    fraction = quant.outlier_fraction * share
    cap = quant.outlier_cap if fraction else None
    return replace(quant, outlier_fraction=fraction, outlier_cap=cap)


def _worthwhile(row: Sequence[Option]) -> list[Option]:
    """Return the lower convex hull: no option that a mixture of two others beats."""
    hull: list[Option] = []
    for option in sorted(row, key=lambda each: (each.nbytes, each.loss)):
        if hull and option.loss >= hull[-1].loss:
            continue
        while len(hull) > 1 and _slope(hull[-2], hull[-1]) >= _slope(hull[-2], option):
            hull.pop()
        hull.append(option)
    return hull


def _slope(left: Option, right: Option) -> float:
    return (right.loss - left.loss) / (right.nbytes - left.nbytes)
