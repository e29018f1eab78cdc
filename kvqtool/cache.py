"""The compressed cache as transformers sees it: a `Cache` whose attention layers are `LayerStore`s.

with attach(model, bundle) as session:
    model.generate(**inputs, past_key_values=session.new_cache(bundle))
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import Cache, DynamicCache, PretrainedConfig

from kvqtool.adaptive_layer import AdaptiveLayer
from kvqtool.adaptive_store import AdaptiveStore
from kvqtool.angles import AngleStore
from kvqtool.bundle import Bundle
from kvqtool.council import Council
from kvqtool.errors import RunError
from kvqtool.layer import KvqLayer, repeated
from kvqtool.open_page import OpenPage
from kvqtool.page_writer import PageWriter
from kvqtool.paged import PagedStore
from kvqtool.read_path import ReadPath, page_form
from kvqtool.reader import PageReader, SharedTables
from kvqtool.seam import LayerSeam, Seam
from kvqtool.stepwise import is_stepwise
from kvqtool.store import LayerStore


class KvqCache(Cache):
    """A compressed cache for one batch of sequences; make it with `Session.new_cache`."""

    def __init__(
        self,
        seam: Seam,
        bundle: Bundle,
        config: PretrainedConfig,
        prefill: str,
        paths: dict[int, ReadPath],
    ) -> None:
        """Take the stock cache's layers and put a store in place of each one that is packed;
        `paths` says how each of these is read, by index.
        """
        self.seam = seam
        self.bundle = bundle
        self.prefill = prefill
        self.shared = SharedTables()
        self.angles = {
            layer.group: _angle_store(layer) for layer in seam.packed if is_rotated(layer, bundle)
        }
        self._announced: dict[int, tuple[Tensor, Tensor, Tensor | None]] = {}
        self._padding: tuple[int, ...] = ()
        self._has_begun = False
        rule = bundle.spec.adaptive
        self._council = Council() if rule is not None and rule.level == "token" else None
        layers = DynamicCache(config=config).layers
        for layer in seam.packed:
            layers[layer.index] = self._new_layer(layer, paths[layer.index])
        super().__init__(layers=layers)

    def _new_layer(self, layer: LayerSeam, path: ReadPath) -> KvqLayer:
        spec, books = self.bundle.spec_of(layer.index), self.bundle.codebooks_of(layer.index)
        angles = self.angles[layer.group] if is_rotated(layer, self.bundle) else None
        if spec.adaptive:
            store = AdaptiveStore(spec, books, layer)
            return AdaptiveLayer(store, angles, self.prefill, path, self._council)
        if not path.is_fused:
            return KvqLayer(LayerStore(spec, books, layer), angles, self.prefill, path)
        form = page_form(layer, spec)
        reader = PageReader(layer, spec, books, form, self.shared)
        opened = OpenPage(PageWriter(spec, books, reader))
        paged = PagedStore(spec, books, layer, form, opened)
        return KvqLayer(paged, angles, self.prefill, path, reader)

    def tokens_at_once(self, wanted: int | None) -> int | None:
        """Return how many tokens of a prompt one call reads: `wanted` (None for all), or one where
        bits are decided step by step and the prompt is not the exact one that comes first.
        """
        is_first = self.prefill == "exact" and not self.get_seq_length()
        return wanted if is_first or not is_stepwise(self.bundle.spec) else 1

    def announce(self, layer_idx: int, cos: Tensor, sin: Tensor, positions: Tensor | None) -> None:
        """Take note of the angles a layer's next states are rotated by; called before the attention
        module runs.
        """
        self._announced[layer_idx] = cos, sin, positions

    def announce_mask(self, mask: Tensor | None) -> None:
        """Take note of left padding: until every sequence has begun, its length may still grow.

        Args:
            mask: (batch, tokens so far) 0 where a sequence is padded; None without padding.
        """
        if self._has_begun or mask is None or mask.dim() != 2:
            return
        is_real = mask.bool()
        self._has_begun = bool(is_real.any(dim=1).all())
        padding = (is_real.cumsum(dim=1) == 0).sum(dim=1)
        self._padding = tuple(padding.tolist()) if padding.any() else ()

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Store a layer's new states and return what its new tokens attend to; see
        `KvqLayer.update`.

        Raises:
            RunError: outside `with attach(model)`, where nothing says how keys are rotated.
        """
        layer = self.layers[layer_idx]
        if isinstance(layer, KvqLayer):
            self.prepare(layer_idx, key_states, layer.store.tokens)
        states = super().update(key_states, value_states, layer_idx, *args, **kwargs)
        if layer_idx == len(self.layers) - 1:
            for angles in self.angles.values():
                angles.forget()
        return states

    def prepare(self, layer_idx: int, key_states: Tensor, before: int) -> None:
        """Tell a packed layer how sequences are padded, and by which angles the keys that come next
        are rotated.

        Args:
            layer_idx: the layer.
            key_states: (batch, num_kv_heads, tokens, key_dim), the keys that come.
            before: tokens of each sequence that came before.

        Raises:
            RunError: outside `with attach(model)`.
        """
        layer = self.layers[layer_idx]
        assert isinstance(layer, KvqLayer), "other layers are not packed"
        layer.store.padding = self._padding
        if layer.angles is not None:
            self._extend_angles(layer.angles, layer_idx, key_states, before)

    def _extend_angles(
        self, angles: AngleStore, layer_idx: int, key_states: Tensor, before: int
    ) -> None:
        announced = self._announced.pop(layer_idx, None)
        if announced is None:
            raise RunError(
                "the cache was used outside `with attach(model, bundle)`; "
                "keep the forward inside the block"
            )
        # The first layer of a group to arrive brings the angles for all of them.
        if angles.tokens < before + key_states.shape[2]:
            cos, sin, positions = (
                part if part is None else part.to(key_states.device) for part in announced
            )
            assert cos is not None and sin is not None
            angles.extend(cos, sin, positions, key_states.shape[0])

    def crop(self, tokens_to_remove: int) -> None:
        """Drop the last tokens of every sequence."""
        super().crop(tokens_to_remove)
        for angles in self.angles.values():
            angles.truncate(self.get_seq_length())

    def reset(self) -> None:
        """Forget everything."""
        super().reset()
        self._padding, self._has_begun = (), False
        for angles in self.angles.values():
            angles.truncate(0)

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        """Put the batch into the order of the chosen beams."""
        super().reorder_cache(beam_idx)
        self._select_angles(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each sequence."""
        batch = self.stores[0].batch if not self.stores[0].is_empty else 0
        super().batch_repeat_interleave(repeats)
        self._select_angles(repeated(batch, repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the sequences at `indices`."""
        super().batch_select_indices(indices)
        self._select_angles(indices)

    def _select_angles(self, sequences: Tensor) -> None:
        if self._padding:
            self._padding = tuple(self._padding[i] for i in sequences.tolist())
        for angles in self.angles.values():
            angles.select(sequences)

    @property
    def stores(self) -> list[LayerStore]:
        """The packed layers' stores, by layer."""
        return [layer.store for layer in self.layers if isinstance(layer, KvqLayer)]

    @property
    def nbytes(self) -> int:
        """Bytes of every tensor the packed layers have allocated, angles and the kernels' tables
        included.
        """
        tensors = [t for store in self.stores for group in store.tensors.values() for t in group]
        tensors += [t for angles in self.angles.values() for t in angles.tensors]
        readers = [layer.reader for layer in self.layers if isinstance(layer, KvqLayer)]
        tensors += [t for reader in readers if reader is not None for t in reader.tensors]
        tensors += self.shared.tensors
        return sum(t.numel() * t.element_size() for t in tensors)


def is_rotated(layer: LayerSeam, bundle: Bundle) -> bool:
    """Whether a layer's keys are stored before RoPE and rotated again on read."""
    return layer.rotation is not None and bundle.spec.key.pre_rope


def _angle_store(layer: LayerSeam) -> AngleStore:
    assert layer.rotation is not None
    return AngleStore(layer.rotation, layer.formula)
