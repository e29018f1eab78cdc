"""The compressed cache as transformers sees it: a `Cache` whose full-attention layers are
`LayerStore`s.

with attach(model, bundle) as session:
    model.generate(**inputs, past_key_values=session.new_cache(bundle))
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor
from transformers import Cache, DynamicCache, PretrainedConfig
from transformers.cache_utils import CacheLayerMixin

from kvqtool.attention import Band, mark_band
from kvqtool.bundle import Bundle
from kvqtool.errors import RunError
from kvqtool.memory import exact_bytes, paper_bytes
from kvqtool.rope import AngleStore
from kvqtool.seam import LayerSeam, Seam
from kvqtool.store import LayerStore

# The one path there is until the CUDA kernels: torch decodes the whole cache for stock attention.
KERNEL: Final = "torch (materialise)"


@dataclass(frozen=True)
class CacheUsage:
    """What a cache holds, measured on its tensors.

    Args:
        tokens: tokens of each sequence.
        batch: sequences.
        cache_bytes: bytes of every tensor the cache has allocated.
        cache_bytes_fp16: bytes of the same states in 16-bit floats.
        paper_bytes: bytes by KVQuant's accounting.
        effective_bits: 8 * cache_bytes over the elements stored.
        outliers: elements stored exactly beside the codes.
        quantized_share: share of tokens that are stored as codes.
    """

    tokens: int
    batch: int
    cache_bytes: int
    cache_bytes_fp16: int
    paper_bytes: float
    effective_bits: float
    outliers: int
    quantized_share: float


class KvqLayer(CacheLayerMixin):
    """One layer of the cache: hands states to its store and the store's contents back to the
    model.
    """

    is_sliding = False
    is_croppable = True
    supports_early_init = False

    def __init__(self, store: LayerStore, angles: AngleStore | None, prefill: str) -> None:
        """Wrap a store; `angles` is the angle store it shares with other layers, None where keys
        are not rotated.
        """
        super().__init__()
        self.store = store
        self.angles = angles
        self.prefill = prefill

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Do nothing: a store starts with the first states."""

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Store new states and return what the new tokens attend to.

        Args:
            key_states: (batch, num_kv_heads, tokens, key_dim) after RoPE.
            value_states: (batch, num_kv_heads, tokens, value_dim).
            *args: ignored; transformers passes none.
            **kwargs: likewise.

        Returns:
            Keys after RoPE and values of all stored tokens, in the model's dtype.
        """
        is_prompt, window = self.store.is_empty, None if self.store.is_empty else self.store.window
        self.store.append(key_states, value_states, self._read_angles)
        self.is_initialized = True
        if is_prompt and self.prefill == "exact":
            return key_states, value_states
        keys, values = self.store.read(self._read_angles)
        residual = self.store.spec.residual_length
        if residual and key_states.shape[2] > 1:
            tail = [key_states, value_states]
            if window is not None:
                tail = [torch.cat([old, new], dim=2) for old, new in zip(window, tail, strict=True)]
            mark_band(keys, Band(tail[0], tail[1], residual))
        return keys, values

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Return the keys a call with `query_length` queries will see, and the first one's
        index.
        """
        return self.store.tokens + query_length, 0

    def get_seq_length(self) -> int:
        """Return the stored tokens."""
        return self.store.tokens

    def get_max_length(self) -> int:
        """Return -1: the cache grows without bound."""
        return -1

    def get_max_cache_shape(self) -> int:
        """Return -1, under the name transformers 5.17 asks for."""
        return -1

    def reset(self) -> None:
        """Forget everything."""
        self.store.clear()
        self.is_initialized = False

    def crop(self, tokens_to_remove: int) -> None:
        """Drop the last tokens: `tokens_to_remove` is minus their number (a positive value is the
        length to keep).
        """
        if not self.store.is_empty:
            keep = (
                tokens_to_remove if tokens_to_remove > 0 else self.store.tokens + tokens_to_remove
            )
            self.store.truncate(max(keep, 0))

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Put the batch into the order of the chosen beams."""
        self.batch_select_indices(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each sequence."""
        if not self.store.is_empty:
            self.batch_select_indices(_repeated(self.store.batch, repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the sequences at `indices`."""
        if not self.store.is_empty:
            self.store.select(indices.to(self.store.window[0].device))

    def _read_angles(self, start: int, stop: int) -> tuple[Tensor, Tensor]:
        assert self.angles is not None, "only rotated layers ask for angles"
        return self.angles.read(start, stop)


class KvqCache(Cache):
    """A compressed cache for one batch of sequences; make it with `Session.new_cache`."""

    def __init__(self, seam: Seam, bundle: Bundle, config: PretrainedConfig, prefill: str) -> None:
        """Take the stock cache's layers and put a store in place of each one that is packed."""
        self.seam = seam
        self.bundle = bundle
        self.prefill = prefill
        self.angles = {
            layer.group: _angle_store(layer) for layer in seam.packed if _is_rotated(layer, bundle)
        }
        self._announced: dict[int, tuple[Tensor, Tensor, Tensor | None]] = {}
        layers = DynamicCache(config=config).layers
        for layer in seam.packed:
            books = bundle.codebooks_of(layer.index)
            store = LayerStore(bundle.spec, books, layer.rotation, layer.index)
            angles = self.angles[layer.group] if _is_rotated(layer, bundle) else None
            layers[layer.index] = KvqLayer(store, angles, prefill)
        super().__init__(layers=layers)

    def announce(self, layer_idx: int, cos: Tensor, sin: Tensor, positions: Tensor | None) -> None:
        """Take note of the angles a layer's next states are rotated by; called before the attention
        module runs.
        """
        self._announced[layer_idx] = cos, sin, positions

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Store a layer's new states and return what its new tokens attend to; see
        `KvqLayer.update`.

        Raises:
            RunError: outside `with attach(model)`, where nothing says how keys are rotated.
        """
        layer = self.layers[layer_idx]
        if isinstance(layer, KvqLayer) and layer.angles is not None:
            self._extend_angles(layer, layer_idx, key_states)
        states = super().update(key_states, value_states, layer_idx, *args, **kwargs)
        if layer_idx == len(self.layers) - 1:
            for angles in self.angles.values():
                angles.forget()
        return states

    def _extend_angles(self, layer: KvqLayer, layer_idx: int, key_states: Tensor) -> None:
        announced = self._announced.pop(layer_idx, None)
        if announced is None:
            raise RunError(
                "the cache was used outside `with attach(model, bundle)`; "
                "keep the forward inside the block"
            )
        assert layer.angles is not None
        # The first layer of a group to arrive brings the angles for all of them.
        if layer.angles.tokens < layer.store.tokens + key_states.shape[2]:
            cos, sin, positions = (
                part if part is None else part.to(key_states.device) for part in announced
            )
            assert cos is not None and sin is not None
            layer.angles.extend(cos, sin, positions, key_states.shape[0])

    def crop(self, tokens_to_remove: int) -> None:
        """Drop the last tokens of every sequence."""
        super().crop(tokens_to_remove)
        for angles in self.angles.values():
            angles.truncate(self.get_seq_length())

    def reset(self) -> None:
        """Forget everything."""
        super().reset()
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
        self._select_angles(_repeated(batch, repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the sequences at `indices`."""
        super().batch_select_indices(indices)
        self._select_angles(indices)

    def _select_angles(self, sequences: Tensor) -> None:
        for angles in self.angles.values():
            angles.select(sequences)

    @property
    def stores(self) -> list[LayerStore]:
        """The packed layers' stores, by layer."""
        return [layer.store for layer in self.layers if isinstance(layer, KvqLayer)]

    @property
    def nbytes(self) -> int:
        """Bytes of every tensor the cache has allocated, stock layers and angles included."""
        tensors = [t for store in self.stores for group in store.tensors.values() for t in group]
        tensors += [t for angles in self.angles.values() for t in angles.tensors]
        for layer in self.layers:
            if not isinstance(layer, KvqLayer):
                tensors += [
                    t
                    for t in (getattr(layer, "keys", None), getattr(layer, "values", None))
                    if t is not None
                ]
        return sum(t.numel() * t.element_size() for t in tensors)

    def usage(self) -> CacheUsage:
        """Measure what the cache holds now."""
        stores = [store for store in self.stores if not store.is_empty]
        tokens, batch = stores[0].tokens, stores[0].batch
        layers = tuple(store.geometry for store in stores)
        plain = exact_bytes(layers, batch, tokens)
        packed = sum(store.bodies[0].tokens for store in stores)
        is_fp = self.bundle.spec.key.method == "fp"
        return CacheUsage(
            tokens=tokens,
            batch=batch,
            cache_bytes=self.nbytes,
            cache_bytes_fp16=plain,
            paper_bytes=paper_bytes(self.bundle.spec, layers, batch, tokens),
            effective_bits=16 * self.nbytes / plain,
            outliers=sum(body.outliers for store in stores for body in store.bodies),
            quantized_share=0.0 if is_fp else packed / (tokens * len(stores)),
        )

    def layer_report(self) -> list[dict[str, Any]]:
        """Return one row per layer: what it is, how its keys rotate, how it is stored and read."""
        spec, rows = self.bundle.spec, []
        for layer in self.seam.layers:
            packed = layer.is_packed
            key = spec.key
            axis = "channel" if key.per_channel else "group" if key.group_size else "token"
            rotated = _is_rotated(layer, self.bundle)
            rows.append(
                {
                    "layer": layer.index,
                    "kind": "full attention" if packed else "stock cache",
                    "rope": layer.note,
                    "key_storage": ("pre-RoPE" if rotated else "post-RoPE") if packed else None,
                    "key_axis": axis if packed and key.method != "fp" else None,
                    "key_bits": key.bits if packed else None,
                    "value_bits": spec.value.bits if packed else None,
                    "angles": self.angles[layer.group].kind if packed and rotated else None,
                    "read_path": "materialise" if packed else "stock",
                }
            )
        return rows


def _is_rotated(layer: LayerSeam, bundle: Bundle) -> bool:
    return layer.rotation is not None and bundle.spec.key.pre_rope


def _angle_store(layer: LayerSeam) -> AngleStore:
    assert layer.rotation is not None
    return AngleStore(layer.rotation, layer.formula)


def _repeated(batch: int, repeats: int) -> Tensor:
    return torch.arange(batch).repeat_interleave(repeats)
