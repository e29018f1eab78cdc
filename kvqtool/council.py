"""The layers of a cache whose tokens share their bits among all layers (QAQ's level token).

A token's bits are decided when it leaves the recent windows, from its ranges and the attention it
got in all of them. In a step of one token that is before any layer has stored it; in a prompt that
is read exactly, after the last layer has. A call of several tokens in between would need what later
layers have yet to see, and is refused.
"""

from __future__ import annotations

import torch

from kvqtool.adaptive_store import AdaptiveStore
from kvqtool.decision import decide, united
from kvqtool.errors import InputError, RunError
from kvqtool.rows import Pair
from kvqtool.spec import KvSpec
from kvqtool.store import Angles


def check_protocol(spec: KvSpec, protocol: str) -> None:
    """Refuse to read at once what a scheme decides step by step.

    Args:
        spec: the scheme.
        protocol: one of `perplexity.PROTOCOLS`.

    Raises:
        InputError: naming the protocol that works.
    """
    if shares_layers(spec) and protocol != "true-decode":
        raise InputError(
            f"{spec.name} decides a token's bits in all layers at once, step by step, which "
            f"{protocol} cannot follow; use --protocol true-decode, or qaq without -token"
        )


def shares_layers(spec: KvSpec) -> bool:
    """Return whether a token has the same bits in all layers."""
    return spec.adaptive is not None and spec.adaptive.level == "token"


class Council:
    """Decides for all layers of a cache at once."""

    def __init__(self) -> None:
        """Start without a layer."""
        self._members: list[tuple[AdaptiveStore, Angles]] = []
        self._agreed: Pair | None = None

    def join(self, store: AdaptiveStore, angles: Angles) -> None:
        """Take in the next layer and what its keys are rotated by."""
        self._members.append((store, angles))

    def check(self, queries: int, *, is_exact: bool) -> None:
        """Refuse a call of several tokens that is no exact prompt.

        Raises:
            RunError: naming what to do instead.
        """
        if queries > 1 and not is_exact:
            raise RunError(
                "layers that share a token's bits decide them step by step; after an exact prompt "
                "feed one token at a time (ppl: --protocol true-decode), or use qaq without -token"
            )

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
