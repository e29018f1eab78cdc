"""One layer of a cache whose tokens get bits by attention: it watches the rows of the last queries.

Weights are computed from the queries and the stored keys, for the tokens of the recent window, a
block of queries at a time. A query sees the last n tokens exactly; what it gives to them decides
their bits, so no query that comes later has a say, and a call of many tokens stores what decoding
them one by one would.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kvqtool.adaptive_store import AdaptiveStore
from kvqtool.angles import AngleStore
from kvqtool.attention import Band, Scoring, Watch, mark_band, mixed_weights, query_blocks
from kvqtool.council import Council
from kvqtool.errors import InputError, RunError
from kvqtool.layer import KvqLayer
from kvqtool.read_path import ReadPath
from kvqtool.stepwise import check_call


class AdaptiveLayer(KvqLayer):  # type: ignore[no-untyped-call]  # transformers' base
    """A `KvqLayer` whose store waits for attention before it encodes."""

    store: AdaptiveStore

    def __init__(
        self,
        store: AdaptiveStore,
        angles: AngleStore | None,
        prefill: str,
        path: ReadPath,
        council: Council | None = None,
    ) -> None:
        """Wrap a store; see `KvqLayer`. `council` decides where all layers share a token's bits."""
        super().__init__(store, angles, prefill, path)
        self.council = council
        if council is not None:
            council.join(store, self.read_angles)

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Store new states and return what the new tokens attend to; see `KvqLayer.update`.

        Raises:
            RunError: when the last call's attention was not seen, or when bits are decided step by
                step and several tokens come at once.
        """
        if self.store.is_waiting:
            raise RunError(
                f"layer {self.store.layer} attends where its cache cannot see it, and qaq decides "
                "bits by attention; use a spec with fixed bits, like nuq3-1%"
            )
        is_exact = self.store.is_empty and self.prefill == "exact"
        check_call(self.store.spec, key_states.shape[2], is_exact=is_exact)
        first = self.first_seen()
        self.store.take(key_states, value_states)
        self.is_initialized = True
        self.path.count("exact" if is_exact else "materialise")
        keys, values, queries = key_states, value_states, key_states.shape[2]
        if not is_exact:
            if queries == 1 and self.council is not None:
                self.council.commit(self.store)
            elif queries == 1:
                self.store.commit(self.read_angles)
            keys, values = self.store.read(self.read_angles, first)
        watch = _Observer(is_exact, self, first)
        return mark_band(keys, self.band(keys, queries, watch)), values

    def band(self, keys: Tensor, queries: int, watch: Watch | None = None) -> Band:
        """Return which of the keys, the last of which are those of `queries` tokens, each of these
        sees exactly: those the store holds so, as many as are given.
        """
        key, value = self.store.window
        tail = min(key.shape[2], keys.shape[2])
        key, value = key[:, :, key.shape[2] - tail :], value[:, :, value.shape[2] - tail :]
        places = torch.arange(keys.shape[2] - queries, keys.shape[2], device=keys.device)
        return Band(key, value, places + 1 - self.store.spec.residual_length, watch)

    def activate_past_recording(self) -> None:
        """Refuse speculative decoding.

        Raises:
            InputError: always; tokens that are taken back have had a say in others' bits.
        """
        raise InputError(
            "qaq decides bits by attention, and speculative decoding takes back what was attended "
            "to; use a spec with fixed bits, like nuq3-1%"
        )

    def settle(self, greatest: Tensor, first: int, *, together: bool) -> Tensor | None:
        """Encode what has left the window; see `AdaptiveStore.settle`.

        Returns:
            The values of tokens from `first` on, where some that queries attend to were encoded.
        """
        is_changed = self.store.leaving > 0 and not together
        self.store.settle(greatest, self.read_angles, together=together)
        if self.council is not None and together:
            self.council.settle(self.store)
            return None
        values = self.store.read(self.read_angles, first)[1] if is_changed else None
        self.store.drop_unseen()
        return values


@dataclass(frozen=True)
class _Observer(Watch):
    """Reads one call's attention for a layer, whose first token in sight is `first`."""

    layer: AdaptiveLayer
    first: int

    def look(
        self, query: Tensor, key: Tensor, mask: Tensor | None, scoring: Scoring
    ) -> Tensor | None:
        """Find the greatest weight of each token of the window and let the layer settle."""
        queries = query.shape[2]
        band, window = self.layer.band(key, queries), self.layer.store.spec.residual_length
        greatest = torch.zeros((), device=query.device)
        # Of a prompt that is decided as a whole, the last n queries.
        first = max(queries - window, 0) if self.sees_exactly else 0
        for block in query_blocks(queries - first):
            rows = slice(first + block.start, first + block.stop)
            weights, recent = mixed_weights(query, key, band, mask, scoring, rows)
            if self.layer.store.shadow is not None and not self.sees_exactly:
                self.layer.store.rise(weights.amax(dim=(2, 3)))
            weights = weights[..., key.shape[2] - recent.shape[1] :]
            if not self.sees_exactly:
                weights = weights * recent
            greatest = torch.maximum(greatest, weights.amax(dim=(2, 3)))
        return self.layer.settle(greatest, self.first, together=self.sees_exactly)
