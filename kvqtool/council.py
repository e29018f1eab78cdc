"""The layers of a cache whose tokens share their bits among all layers (QAQ's level token).

A token's bits are decided when it leaves the recent windows, from its ranges and the attention it
got in all of them. In a step of one token that is before any layer has stored it; in a prompt that
is read exactly, after the last layer has. A call of several tokens in between would need what later
layers have yet to see; `stepwise` refuses it.
"""

from __future__ import annotations

import torch

from kvqtool.adaptive_store import AdaptiveStore
from kvqtool.decision import decide, united
from kvqtool.rows import Pair
from kvqtool.store import Angles


class Council:
    """Decides for all layers of a cache at once."""

    def __init__(self) -> None:
        """Start without a layer."""
        self._members: list[tuple[AdaptiveStore, Angles]] = []
        self._agreed: Pair | None = None

    def join(self, store: AdaptiveStore, angles: Angles) -> None:
        """Take in the next layer and what its keys are rotated by."""
        self._members.append((store, angles))

    def commit(self, store: AdaptiveStore) -> None:
        """Encode what left a layer's window in a step of one token."""
        if not store.leaving:
            return
        if self._agreed is None:
            self._agreed = self._decide(store.leaving)
        self._encode(store, self._agreed)
        if store is self._members[-1][0]:
            self._agreed = None

    def settle(self, store: AdaptiveStore) -> None:
        """Encode a prompt in all layers, once the last of them has seen its attention."""
        if store is not self._members[-1][0] or not store.leaving:
            return
        agreed = self._decide(store.leaving)
        for each, _ in self._members:
            self._encode(each, agreed)
            each.drop_unseen()

    def _decide(self, tokens: int) -> Pair:
        facts = [store.facts(tokens, angles) for store, angles in self._members]
        stores = [store for store, _ in self._members]
        # A sliding layer counts its window's tokens only; what is decided is for all.
        counts = torch.stack([store.counts(tokens) for store in stores]).amax(0)
        return decide(united(facts), counts, stores[0].spec)

    def _encode(self, store: AdaptiveStore, agreed: Pair) -> None:
        (angles,) = (angles for each, angles in self._members if each is store)
        device = store.attention.device
        store.commit_as((agreed[0].to(device), agreed[1].to(device)), angles)
