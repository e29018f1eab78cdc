"""The most memory one call of a model takes: weights, cache, activations and scratch.

A decoder runs layer by layer, so the peak is what all layers keep and the most that any one of them
needs for a moment. Activations are those of transformers' Llama with `sdpa`; other decoders differ
by a few widths of `hidden`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from kvqtool.kernel_scratch import attend_scratch, pack_scratch, room_bytes
from kvqtool.layers import CacheLayer, CacheModel
from kvqtool.memory import ITEM_BYTES, PAGE_TOKENS, capacity, split_tokens
from kvqtool.scratch import Step, append_scratch, attention_scratch, read_scratch, shown_bytes
from kvqtool.side import EXACT, WIDTHS, QuantSpec
from kvqtool.spec import KvSpec
from kvqtool.trunk import Trunk

_FLOAT: Final = ITEM_BYTES["float32"]
# What cuBLAS takes from torch's allocator on its first call: 32 MiB on Hopper and later, 8 before.
WORKSPACE_BYTES: Final = 32 << 20


@dataclass(frozen=True)
class Peak:
    """Where one call's memory peaks, in bytes; `transient_bytes` is what is free again afterwards.

    Args:
        weights: the model's weights; 0 where they are unknown.
        cache: the cache after the call.
        activations: hidden states, mask and rotary tables at that point.
        scratch: what the phase takes beside them.
        phase: `pack`, `read`, `attend`, `feed-forward` or `logits`.
    """

    weights: int
    cache: int
    activations: int
    scratch: int
    phase: str

    @property
    def transient_bytes(self) -> int:
        """What the call takes for a moment."""
        return self.activations + self.scratch

    @property
    def terms(self) -> dict[str, int]:
        """Its parts by name."""
        return {
            "weights": self.weights,
            "cache": self.cache,
            "activations": self.activations,
            "scratch": self.scratch,
        }

    @property
    def nbytes(self) -> int:
        """All of it."""
        return self.weights + self.cache + self.transient_bytes


@dataclass(frozen=True)
class Forward:
    """A model that reads `prompt` tokens in chunks and then generates.

    Args:
        cache: the cache.
        trunk: the model's widths.
        weights: bytes of its weights.
        chunk: tokens of each sequence that one call reads; None for the whole prompt.
        logit_positions: positions of a call whose logits are computed; transformers' `generate`
            and kvqtool compute the last one's.
        is_fused: whether kernels read and write the layers, as far as that is planned.
    """

    cache: CacheModel
    trunk: Trunk
    weights: int
    chunk: int | None = None
    logit_positions: int = 1
    is_fused: bool = False

    def prefill(self, prompt: int) -> Peak:
        """Return the peak of reading a prompt: of its first call or its last."""
        fresh = min(self.chunk or prompt, prompt)
        calls = [
            (fresh, fresh),
            (prompt // fresh * fresh, fresh),
            (prompt, prompt % fresh or fresh),
        ]
        steps = [self._step(*call, is_joined=call[0] > fresh) for call in dict.fromkeys(calls)]
        return max((self._peak(step) for step in steps), key=lambda peak: peak.nbytes)

    def decode(self, prompt: int, tokens: int) -> Peak:
        """Return the peak of the call that makes the cache `tokens` long, one token at a time."""
        is_joined = prompt > (self.chunk or prompt) or any(
            self._grows_pages(layer, prompt, tokens) for layer in self.cache.distinct
        )
        return self._peak(self._step(tokens, 1, is_joined=is_joined))

    def _grows_pages(self, layer: CacheLayer, prompt: int, tokens: int) -> bool:
        """Whether a body that one call packed lies in several blocks at `tokens`: one more for each
        page that it needed, those that a sliding layer has dropped aside.
        """
        spec = layer.own_spec or self.cache.spec
        before, after = (capacity(split_tokens(spec, length)[1]) for length in (prompt, tokens))
        is_long = layer.parts(spec, tokens)[1] > PAGE_TOKENS
        return layer.is_packed and is_long and after > before

    def _step(self, tokens: int, fresh: int, *, is_joined: bool) -> Step:
        trunk = self.trunk
        return Step(self.cache, tokens, fresh, is_joined, trunk.num_heads, trunk.score_bytes)

    def _peak(self, step: Step) -> Peak:
        """Return the highest point of one call, over its layers and their phases."""
        kept = self.cache.nbytes(step.tokens)
        tables = 0 if step.is_first or self.is_fused else self._kept_tables(step, kept)
        if self.is_fused:
            counted = self.cache.counted.items()
            kept += sum(count * room_bytes(layer, step) for layer, count in counted)
        best: tuple[int, int, str] = (0, 0, "logits")
        for layer in self.cache.distinct:
            for phase, activations, scratch in self._phases(layer, step, tables):
                if activations + scratch > best[0] + best[1]:
                    best = activations, scratch, phase
        return Peak(self.weights, kept, *best)

    def _phases(self, layer: CacheLayer, step: Step, read: int) -> list[tuple[str, int, int]]:
        """Return (name, activations, scratch) of a layer's phases and of the output head.

        Args:
            layer: the layer.
            step: the call.
            read: bytes of rotary tables that reading leaves alive.
        """
        trunk, item, rows = self.trunk, step.item, step.fresh * step.cache.batch
        tables = 2 * item * step.fresh * trunk.query_dim
        hidden = item * rows * trunk.hidden
        mask = 0 if self.is_fused else step.mask_bytes
        shared = 2 * hidden + mask + tables  # the embeddings and the layer's input live on
        fresh = item * rows * layer.geometry.elements
        attending = shared + hidden + item * rows * trunk.num_heads * trunk.query_dim
        output = item * rows * trunk.num_heads * trunk.value_dim
        phases = []
        if self.is_fused:
            phases.append(("pack", attending + fresh, pack_scratch(layer, step)))
        elif layer.is_packed:
            phases.append(("pack", attending + fresh, append_scratch(layer, step)))
            if not step.is_first:
                phases.append(("read", attending + fresh, read_scratch(layer, step)))
        output += self._attended(layer, step, fresh, read)
        phases.append(("attend", attending, output))
        middle = item * rows * (3 if trunk.is_gated else 2) * trunk.intermediate
        phases.append(("feed-forward", shared + 2 * hidden + read, middle))
        positions = min(self.logit_positions, step.fresh) * step.cache.batch
        logits = positions * trunk.vocabulary * (item + (_FLOAT if item != _FLOAT else 0))
        phases.append(("logits", 2 * hidden, logits))
        return phases

    def _attended(self, layer: CacheLayer, step: Step, fresh: int, read: int) -> int:
        """Return what a layer's attention is shown, its new states of `fresh` bytes for one, and
        what it takes beside that.
        """
        if self.is_fused:
            return fresh + attend_scratch(layer, step)
        if not layer.is_packed:
            shown = fresh + self._own_cache(layer, step)
        else:
            shown = fresh if step.is_first else shown_bytes(layer, step) + read
        return shown + attention_scratch(layer, step)

    def _own_cache(self, layer: CacheLayer, step: Step) -> int:
        """Return what growing the model's own cache by copying it takes, and expanding a latent to
        keys and values of all heads.
        """
        item, trunk = step.item, self.trunk
        copied = sum(
            layer.own_bytes(step.cache.batch, step.tokens - step.fresh, step.cache.dtype).values()
        )
        if layer.kind not in ("latent", "indexed"):
            return copied
        unrotated = trunk.query_dim - layer.geometry.value_dim
        expanded = trunk.num_heads * (unrotated + trunk.value_dim + trunk.query_dim)
        return copied + item * step.tokens * step.cache.batch * expanded

    def _kept_tables(self, step: Step, kept: int) -> int:
        """Return what the rotary tables of the tokens read add to the peak after reading.

        The last layer lets go of them, and before it, the last layer's new tokens are not stored.
        """
        grown = kept - self.cache.nbytes(step.tokens - step.fresh)
        return max(step.table_bytes(step.tokens) - grown // len(self.cache.layers), 0)


def codebook_bytes(spec: KvSpec, layers: tuple[CacheLayer, ...]) -> int:
    """Return the bytes of the codebooks that a running model holds on its device."""
    total = 0
    for layer in layers:
        own, heads = layer.own_spec or spec, layer.geometry.num_kv_heads
        if layer.is_packed:
            total += _codebook(own.key, heads, layer.geometry.key_dim)
            total += _codebook(own.value, heads, layer.geometry.value_dim)
    return total


def _codebook(spec: QuantSpec, heads: int, width: int) -> int:
    """Levels to encode by and to decode to, ranges of channels, and what compensation needs."""
    if spec.method == EXACT:
        return 0
    channels = heads * width
    levels = sum(1 << bits for bits in (WIDTHS if spec.is_adaptive else (spec.bits,)))
    floats = 2 * levels * (channels if spec.channel_levels else 1)
    floats += 2 * channels if spec.per_channel else 0
    if not spec.compensated:
        return _FLOAT * floats
    return _FLOAT * (floats + channels * width) + ITEM_BYTES["int16"] * channels
