"""A layer's cache whose tokens are given bits as they leave the recent window (QAQ).

The window holds the last n tokens exactly, and beside each the greatest attention weight that it
got while it was there. When a token leaves, its key's bits follow from its range, its value's from
its range and that weight; they are decided once. The tokens that T of QAQ's formulas counts are
those seen by then.
"""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor

from kvqtool.adaptive import Adaptive
from kvqtool.codec import Normalized, normalize
from kvqtool.decision import Facts, decide
from kvqtool.mixed import decode_mixed, encode_mixed, spread_of
from kvqtool.packed import PackedBody
from kvqtool.rows import Pair, Rows
from kvqtool.shadow import Shadow
from kvqtool.side import QuantSpec
from kvqtool.store import Angles, LayerStore
from kvqtool.tolerance import RELEASED_QUERY_NORM

ATTENTION: Final = "window.attention"


class AdaptiveStore(LayerStore):
    """A `LayerStore` of a spec with `adaptive`: tokens that were taken wait for `settle`."""

    def clear(self) -> None:
        """Forget everything."""
        super().clear()
        self.shadow = Shadow() if self.rule.shadow else None
        self.is_waiting = False
        self._seen: Tensor | None = None
        self._decided_at: int | None = None
        self._agreed: Pair | None = None

    @property
    def rule(self) -> Adaptive:
        """How bits are decided."""
        assert self.spec.adaptive is not None, "only such specs come here"
        return self.spec.adaptive

    @property
    def units(self) -> int:
        """Rows of a token of one sequence: what shares bits."""
        return self.rule.units(self.geometry.num_kv_heads)

    @property
    def bodies(self) -> tuple[PackedBody, PackedBody]:
        """The packed keys and values."""
        key, value = super().bodies
        assert isinstance(key, PackedBody) and isinstance(value, PackedBody), "no pages here"
        return key, value

    @property
    def attention(self) -> Tensor:
        """(batch, units, window) float32: the greatest weight of each exact token so far."""
        assert self._seen is not None, "the layer has stored nothing yet"
        return self._seen

    @attention.setter
    def attention(self, seen: Tensor) -> None:
        self._seen = seen

    @property
    def leaving(self) -> int:
        """Tokens that are past the window and not yet encoded."""
        return self._split_window()[0][0].shape[2]

    def take(self, key: Tensor, value: Tensor) -> None:
        """Store new tokens exactly; `settle` has to follow once their queries have been seen."""
        super().take(key, value)
        fresh = self.window[0].shape[2] - self.attention.shape[2]
        self.attention = torch.nn.functional.pad(self.attention, (0, fresh))
        self.is_waiting = True

    def settle(self, greatest: Tensor, angles: Angles, *, together: bool = False) -> None:
        """Take note of attention and encode what has left the window, but where all layers have to
        agree on it first.

        Args:
            greatest: (batch, num_kv_heads, tail) greatest weight that queries gave to each of the
                last `tail` tokens, those of a group of heads together.
            angles: as in `append`.
            together: all tokens are decided now, at the end of a prompt; otherwise each as of when
                decoding would have.
        """
        if self.units == 1:
            greatest = greatest.amax(1, keepdim=True)
        tail = min(greatest.shape[2], self.attention.shape[2])
        ends = self.attention.shape[2] - tail, greatest.shape[2] - tail
        known, new = self.attention[..., ends[0] :], greatest[..., ends[1] :].float()
        self.attention = torch.cat([self.attention[..., : ends[0]], known.maximum(new)], dim=2)
        self._decided_at = self.tokens if together else None
        if self.rule.level != "token":
            self.commit(angles)
            self._decided_at = None
        self.is_waiting = False

    def commit(self, angles: Angles, *, held: int = 0) -> None:
        """Encode what is past the window by the attention noted so far."""
        if self.shadow is not None and self.leaving:
            value = self._flat(self._split_window()[0], angles)[1]
            spread = spread_of(normalize(self._by_unit(value), self._codebooks[1], self.spec.value))
            shape = self.leaving, self.batch, self.units
            dtype = value.dtype if self.spec.value.rotated else self.window[1].dtype
            self.shadow.append(value.view(*shape, -1).to(dtype), spread.view(shape))
        super().commit(angles)
        gone = self.attention.shape[2] - self.window[0].shape[2]
        self.attention = self.attention[..., gone:].clone()

    def rise(self, weights: Tensor) -> None:
        """Give packed values the bits that a later query asks for, where there is a host copy; its
        own step still reads them as they were.

        Args:
            weights: (batch, num_kv_heads, tokens) that it gave to all tokens it saw.
        """
        if self.shadow is None or not self.shadow.tokens:
            return
        held = self.shadow.tokens
        packed = weights[..., : weights.shape[2] - self.window[0].shape[2]][..., -held:]
        # A sliding layer's queries do not see all that its pages still hold.
        seen = torch.nn.functional.pad(packed, (held - packed.shape[2], 0)).float()
        seen = (seen.amax(1, keepdim=True) if self.units == 1 else seen).permute(2, 0, 1)
        rows, spread = self.shadow.parts
        counts = torch.full((held, self.batch), self.tokens)
        facts = Facts((spread, spread), seen.cpu(), 1.0)
        wanted = decide(facts, self.within(counts), self.spec)[1].flatten()
        stored = self.bodies[1].read()["widths"][-len(wanted) :].cpu()
        rising = (wanted > stored).nonzero()[:, 0]
        if len(rising):
            device = weights.device
            states = rows.flatten(0, 2)[rising].to(device).float()
            book, spec = self._codebooks[1], self.spec.value
            encoded = encode_mixed(states, wanted[rising].to(device), book, spec)
            first = self.bodies[1].tokens * self.bodies[1].rows_per_token - len(wanted)
            self.bodies[1].replace((first + rising).to(device), encoded)

    def drop_unseen(self) -> None:
        """Free what a sliding layer's queries will not see again: whole pages."""
        super().drop_unseen()
        if self.shadow is not None:
            self.shadow.keep(self.bodies[1].tokens)

    def truncate(self, tokens: int) -> None:
        """Keep the first `tokens` tokens; those still in the window keep the attention they got,
        from queries that are gone too.
        """
        before = self.bodies[1].tokens
        super().truncate(tokens)
        if self.shadow is not None:
            self.shadow.truncate(before - self.bodies[1].tokens)
        self.attention = self.attention[..., : self.window[0].shape[2]].clone()

    def select(self, sequences: Tensor) -> None:
        """Keep, repeat or reorder sequences."""
        super().select(sequences)
        self.attention = self.attention[sequences]
        if self.shadow is not None:
            self.shadow.select(sequences)

    @property
    def tensors(self) -> dict[str, list[Tensor]]:
        """Every allocated tensor, by the buffer names of `memory.layer_buffers`."""
        return {} if self.is_empty else super().tensors | {ATTENTION: [self.attention]}

    def canonical(self) -> dict[str, Tensor]:
        """Return the layer's content in the layout of saved caches."""
        return super().canonical() | {ATTENTION: self.attention}

    def _start(self, key: Tensor, value: Tensor) -> None:
        super()._start(key, value)
        self._seen = key.new_zeros(key.shape[0], self.units, 0, dtype=torch.float32)

    def _new_bodies(self, channels: tuple[int, int], batch: int) -> tuple[PackedBody, PackedBody]:
        key = PackedBody(self.spec.key, channels[0] // self.units, batch, self.units)
        return key, PackedBody(self.spec.value, channels[1] // self.units, batch, self.units)

    def facts(self, tokens: int, angles: Angles) -> Facts:
        """Return what the bits of the first `tokens` of the window follow from."""
        key, value = self.window
        flat = self._flat((key[:, :, :tokens], value[:, :, :tokens]), angles)
        return self._facts(self._ranged(flat))

    def commit_as(self, widths: Pair, angles: Angles) -> None:
        """Encode what is past the window with widths (tokens, batch, units) that were agreed on."""
        self._agreed = widths
        self.commit(angles)
        self._agreed = self._decided_at = None

    def _encode_rows(self, states: Pair, dtype: torch.dtype) -> tuple[Rows, Rows]:
        ranged = self._ranged(states)
        tokens = len(states[0]) // self.batch
        widths = self._agreed or decide(self._facts(ranged), self.counts(tokens), self.spec)
        key, value = (
            encode_mixed(self._by_unit(flat), width.flatten(), book, spec, found)
            for flat, width, book, spec, found in zip(
                states, widths, self._codebooks, self._sides, ranged, strict=True
            )
        )
        return key, value

    def _facts(self, ranged: tuple[Normalized, Normalized]) -> Facts:
        key, value = (spread_of(side).view(-1, self.batch, self.units) for side in ranged)
        seen = self.attention[..., : len(key)].permute(2, 0, 1)
        return Facts((key, value), seen, self._query_norm())

    def _ranged(self, states: Pair) -> tuple[Normalized, Normalized]:
        """Return ranges and outliers of rows (tokens * batch, channels) of keys and values."""
        key, value = (
            normalize(self._by_unit(flat), book, spec)
            for flat, book, spec in zip(states, self._codebooks, self._sides, strict=True)
        )
        return key, value

    def _by_unit(self, flat: Tensor) -> Tensor:
        return flat.reshape(len(flat) * self.units, flat.shape[1] // self.units)

    @property
    def _sides(self) -> tuple[QuantSpec, QuantSpec]:
        return self.spec.key, self.spec.value

    def _decode_rows(self, rows: tuple[Rows, Rows]) -> Pair:
        sides = zip(rows, self._sides, self._codebooks, self.bodies, strict=True)
        key, value = (decode_mixed(r, book, s, body.channels) for r, s, book, body in sides)
        return key.view(-1, key.shape[1] * self.units), value.view(-1, value.shape[1] * self.units)

    def counts(self, tokens: int) -> Tensor:
        """Return T of the first `tokens` of the window, (tokens, batch): what was seen when their
        bits were decided, padding left out.
        """
        first = self.tokens - self.window[0].shape[2]
        counts = torch.arange(first, first + tokens) + self.spec.residual_length
        if self._decided_at is not None:
            counts = torch.full_like(counts, self._decided_at)
        return self.within(counts[:, None].expand(-1, self.batch))

    def within(self, counts: Tensor) -> Tensor:
        """Return counts of tokens (tokens, batch) without padding and beyond a sliding window."""
        padding = torch.tensor(self.padding or (0,) * self.batch)
        counts = (counts - padding).clamp_min(1)
        return counts.clamp_max(self.sliding_window) if self.sliding_window else counts

    def _query_norm(self) -> Tensor | float:
        """Return |Q|^2 of the units, (units,): the greatest of a layer's heads where they share."""
        if self.rule.formula == "released":
            return RELEASED_QUERY_NORM
        norms = self._codebooks[0].query_norm
        assert norms is not None, "calibration measured it"
        return norms.amax(0, keepdim=True) if self.units == 1 else norms
