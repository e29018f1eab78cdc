"""What the first pass of calibration collects: key ranges and query norms.

A collector is fed layer by layer and keeps sketches only, whose size does not depend on how much
text there is.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Final

import torch
from torch import Tensor

from kvqtool.capture import KeyStates, Watcher
from kvqtool.codebook import Codebook, as_half, round_range
from kvqtool.compensation import BlockFisher
from kvqtool.histogram import LevelHistogram
from kvqtool.quantiles import ChannelQuantiles
from kvqtool.ranks import Ranks
from kvqtool.spec import KvSpec

NO_LEVELS: Final = torch.empty(0)
_QUERIES: Final = "queries"
_QUERY_SHARE: Final = 0.9  # QAQ, section 4
Devices = Mapping[int, torch.device]
Sketch = ChannelQuantiles | LevelHistogram | BlockFisher


class Collector(Watcher):
    """A watcher whose sketches can be put aside, taken up again and merged with those of other
    processes.

    A sketch has a name that ends in its layer's index.
    """

    @property
    @abstractmethod
    def is_needed(self) -> bool:
        """Whether any spec asks for what is collected."""

    @property
    def needs_gradients(self) -> bool:
        """Whether the pass that feeds it has to run the backward."""
        return False

    @property
    @abstractmethod
    def sketches(self) -> Mapping[str, Sketch]:
        """What this process has collected."""

    @abstractmethod
    def restore(self, states: Mapping[str, dict[str, Tensor]], devices: Devices) -> None:
        """Take up sketches by their states, each on its layer's device."""

    @abstractmethod
    def merge(self, ranks: Ranks) -> None:
        """Let what was collected be that of all processes; call it once, when all are done."""


class RangeCollector(Collector):
    """Pass 1: quantile sketches of key channels, sinks left out, one for all specs that see the
    same keys; and of the queries' norms.
    """

    def __init__(self, specs: Sequence[KvSpec]) -> None:
        """Prepare for the specs whose keys have calibrated ranges."""
        self.wanted = sorted({_keys_seen(spec) for spec in specs if spec.key.per_channel})
        self._needs_queries = any(spec.needs_queries for spec in specs)
        self._sketches: dict[str, ChannelQuantiles] = {}
        self._merged: Mapping[str, ChannelQuantiles] = self._sketches

    @property
    def is_needed(self) -> bool:
        """Whether any spec has calibrated ranges, or asks for query norms."""
        return bool(self.wanted) or self._needs_queries

    @property
    def needs_queries(self) -> bool:
        """Whether any spec asks for query norms."""
        return self._needs_queries

    @property
    def sketches(self) -> Mapping[str, ChannelQuantiles]:
        """This process's sketches; merging leaves them as they are."""
        return self._sketches

    def restore(self, states: Mapping[str, dict[str, Tensor]], devices: Devices) -> None:
        """Take up sketches by their states, each on its layer's device."""
        for name, state in states.items():
            device = devices[layer_of(name)]
            self._sketches[name] = ChannelQuantiles.from_state(state, device)

    def merge(self, ranks: Ranks) -> None:
        """Take ranges from the sketches of all processes from now on."""
        self._merged = {name: self._sketches[name].merged(ranks) for name in sorted(self._sketches)}

    def key(self, layer: int, states: KeyStates, gradients: KeyStates | None) -> None:
        """Sketch a layer's keys."""
        for seen in self.wanted:
            pre_rope, sink_tokens = seen
            rows = states.form(pre_rope)[sink_tokens:]
            name = _range_name(seen, layer)
            if name not in self._sketches:
                self._sketches[name] = ChannelQuantiles(rows.shape[1], rows.device)
            self._sketches[name].update(rows)

    def value(self, layer: int, states: Tensor, gradients: Tensor | None) -> None:
        """Ignore values: each token brings its own range."""

    def query(self, layer: int, norms: Tensor) -> None:
        """Sketch a layer's squared query norms, each head apart."""
        name = f"{_QUERIES}.{layer}"
        if name not in self._sketches:
            self._sketches[name] = ChannelQuantiles(norms.shape[1], norms.device)
        self._sketches[name].update(norms[0].T)

    def query_norm(self, layer: int, num_kv_heads: int) -> Tensor:
        """Return the 90th percentile of |Q|^2, (num_kv_heads,): a group's greatest."""
        each = self._merged[f"{_QUERIES}.{layer}"].quantile(_QUERY_SHARE)
        return as_half(each.view(num_kv_heads, -1).amax(1))

    def ranges(self, spec: KvSpec, layer: int) -> Codebook:
        """Return a key codebook with a layer's ranges and no levels yet."""
        sketch = self._merged[_range_name(_keys_seen(spec), layer)]
        lower, upper = sketch.minimum, sketch.maximum
        if spec.key.outlier_fraction:
            tail = spec.key.outlier_fraction / 2
            lower, upper = sketch.quantile(tail), sketch.quantile(1 - tail)
        return Codebook(NO_LEVELS, NO_LEVELS, *round_range(lower, upper))


def _keys_seen(spec: KvSpec) -> tuple[bool, int]:
    """Return what a key range depends on, beside the outlier share: the form of the keys, and the
    sinks left out.
    """
    return spec.key.pre_rope, spec.sink_tokens


def _range_name(seen: tuple[bool, int], layer: int) -> str:
    pre_rope, sink_tokens = seen
    return f"{'before' if pre_rope else 'after'}_rope_sink{sink_tokens}.{layer}"


def layer_of(name: str) -> int:
    """Return the layer a sketch's name ends in."""
    return int(name.rpartition(".")[2])
