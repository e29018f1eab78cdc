"""Read one layer's pages: attend with the fused kernel, or decode all of them for several queries.

On CUDA kernels do both, on a CPU their torch references.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from kvqtool.blockwise import attend_share
from kvqtool.codebook import Codebook, send
from kvqtool.fused import LayerTables, PackedContext, Workspace, attend, new_workspace
from kvqtool.hadamard import rotate_heads
from kvqtool.memory import PAGE_TOKENS
from kvqtool.pages import PageSide, key_table, level_table
from kvqtool.read_path import PageForm, Place, layer_variant
from kvqtool.reading import attend_reference, decode_pages, dequantize
from kvqtool.rows import Pair, cut, join
from kvqtool.scratch import pages_at_once
from kvqtool.seam import LayerSeam
from kvqtool.spec import KvSpec
from kvqtool.turning import angle_table, coefficient_table, frequency_table
from kvqtool.variant import Variant

Triple = tuple[Tensor, Tensor, Tensor]


@dataclass
class SharedTables:
    """What the layers of a cache share: angle tables by group, and what launches write beside
    their results.
    """

    angles: dict[tuple[int, torch.device], Triple] = field(default_factory=dict)
    workspaces: dict[tuple[object, ...], Workspace] = field(default_factory=dict)

    @property
    def tensors(self) -> list[Tensor]:
        """Every allocated tensor."""
        made = [t for pair in self.angles.values() for t in pair]
        return made + [t for w in self.workspaces.values() for t in (w.partials, w.counters)]


class PageReader:
    """What reads one layer's pages; tables are made when states first say where they lie."""

    def __init__(
        self,
        layer: LayerSeam,
        spec: KvSpec,
        books: tuple[Codebook, Codebook],
        form: PageForm,
        shared: SharedTables,
    ) -> None:
        """Keep the layer, its codebooks, how its keys lie in pages, and what layers share."""
        self._layer = layer
        self._spec = spec
        self._books = books
        self._form = form
        self._shared = shared
        self._tables: LayerTables | None = None
        self._variants: dict[tuple[int, torch.dtype, bool], Variant] = {}

    def attend(
        self,
        query: Tensor,
        context: PackedContext,
        scaling: float,
        softcap: float | None,
        log_sums: Tensor | None = None,
    ) -> Tensor:
        """Attend with one query token a sequence.

        Args:
            query: (batch, num_heads, 1, head_dim) after RoPE.
            context: the layer's tokens.
            scaling: factor on scores.
            softcap: cap of the scores, or None.
            log_sums: (batch, num_heads) float32, to hold the log of the sum of exp(score) over
                these tokens; None where they are all there are.

        Returns:
            (batch, 1, num_heads, head_dim) in the query's dtype.
        """
        flat = query[:, :, 0].contiguous()
        variant = self.variant(flat.shape[1], flat, has_softcap=softcap is not None)
        tables = replace(
            self.tables_on(flat.device), scale=scaling * self._form.scaling, softcap=softcap
        )
        if flat.is_cuda:
            workspace = self._workspace(variant, flat)
            if log_sums is not None:
                workspace = replace(workspace, log_sums=log_sums)
            out = attend(flat, context, tables, variant, workspace)
        else:
            out = attend_reference(flat, context, tables, variant, log_sums)
        if self._spec.value.rotated:
            out = rotate_heads(out.float()).to(out.dtype)
        return out[:, None]

    def expand(self, context: PackedContext) -> Pair:
        """Return the keys after RoPE and values that a context holds, (batch, num_kv_heads,
        tokens, head_dim) in the model's dtype.
        """
        columns = context.pages.page_table.shape[1]
        parts = list(self.parts(context, max(columns, 1) * PAGE_TOKENS))
        key, value = (torch.cat([part[side] for part in parts], dim=2) for side in (0, 1))
        return key, value

    def attend_causal(self, query: Tensor, context: PackedContext, scaling: float) -> Tensor:
        """Attend with the last tokens of every sequence, of which the packed ones are decoded a
        fixed number at a time.

        Args:
            query: (batch, num_heads, queries, head_dim) after RoPE, of the context's last tokens.
            context: the layer's tokens.
            scaling: factor on scores.

        Returns:
            (batch, queries, num_heads, head_dim) in the query's dtype.
        """
        out, _ = self.attend_share(query, context, scaling, query.shape[2])
        return out.to(query.dtype).transpose(1, 2).contiguous()

    def attend_share(self, query: Tensor, context: PackedContext, scaling: float, own: int) -> Pair:
        """Attend with the last tokens of every sequence to a share of it; see `attend_causal`.

        Args:
            query: (batch, num_heads, queries, head_dim) after RoPE.
            context: the share, of which the last `own` tokens are the queries'.
            scaling: factor on scores.
            own: as many as queries, or 0.

        Returns:
            (batch, num_heads, queries, head_dim) float32, and the log of the sum of exp(score),
            (batch, num_heads, queries) float32.
        """
        exact, (first, last) = context.exact, _seen(context)
        tokens = exact.sink_key.shape[2] + last - first + exact.window_key.shape[2]
        heads, head_dim = exact.sink_key.shape[1], exact.sink_key.shape[3]
        size = pages_at_once(len(query), heads * head_dim)
        return attend_share(query, self.parts(context, size), tokens - own, scaling)

    def parts(self, context: PackedContext, size: int) -> Iterator[Pair]:
        """Yield what `expand` returns in parts: the sinks with the first `size` packed tokens,
        whole pages of them, the next, and so on; then the exact tokens behind them.
        """
        exact, (first, last) = context.exact, _seen(context)
        head: Pair | None = (exact.sink_key, exact.sink_value)
        for start in range(first // PAGE_TOKENS * PAGE_TOKENS, last, size):
            stop = min(start + size, last)
            decoded = self._decode(_block(context, start, stop), exact.sink_key)
            seen = cut(decoded, max(first - start, 0), stop - start)
            part = seen[0].to(exact.sink_key.dtype), seen[1].to(exact.sink_key.dtype)
            yield self._as_seen(part if head is None else join(head, part))
            head = None
        window = exact.window_key, exact.window_value
        yield self._as_seen(window if head is None else join(head, window))

    def _as_seen(self, states: Pair) -> Pair:
        """Return states as attention sees them, from the form in which pages decode."""
        key, value = states
        if self._form.scaling != 1:
            key = (key.float() * self._form.scaling).to(key.dtype)
        if self._spec.value.rotated and value.numel():
            value = rotate_heads(value.float()).to(value.dtype)
        return key, value

    @property
    def tensors(self) -> list[Tensor]:
        """Tensors that this layer has allocated for itself."""
        return (
            []
            if self._tables is None
            else [self._tables.key_table, self._tables.levels, self._tables.order]
        )

    def _decode(self, context: PackedContext, states: Tensor) -> Pair:
        variant = self.variant(states.shape[1], states)
        tables = self.tables_on(states.device)
        if states.device.type == "cuda":
            return dequantize(context, tables, variant, states.dtype)
        return decode_pages(context, tables, variant)

    def variant(self, num_heads: int, states: Tensor, *, has_softcap: bool = False) -> Variant:
        """Return the kernel for so many query heads, and states of this dtype and device."""
        key = num_heads, states.dtype, has_softcap
        if key not in self._variants:
            place = Place(states.device, states.dtype, num_heads)
            made = layer_variant(self._layer, self._spec, place, softcap=has_softcap)
            self._variants[key] = made
        return self._variants[key]

    def tables_on(self, device: torch.device) -> LayerTables:
        """Return the layer's tables, of scale 1."""
        if self._tables is None or self._tables.order.device != device:
            self._tables = self._make_tables(device)
        return self._tables

    def _make_tables(self, device: torch.device) -> LayerTables:
        geometry, order = self._layer.geometry, self._form.order
        books = tuple(book.to(device) for book in self._books)
        sides = (
            PageSide({}, books[0], self._spec.key, geometry.num_kv_heads, len(order), order),
            PageSide({}, books[1], self._spec.value, geometry.num_kv_heads, len(order), None),
        )
        turns, frequencies, factors = self._angles_on(device)
        return LayerTables(
            key_table(books[0], self._spec.key, order, geometry.num_kv_heads),
            level_table(*sides),
            turns,
            frequencies,
            factors,
            send(order.to(torch.int16), device),
            1.0,
        )

    def _angles_on(self, device: torch.device) -> Triple:
        is_rotated = self._form.inv_freq is not None
        group = self._layer.group if is_rotated else -len(self._form.order)
        key = group, device
        if key not in self._shared.angles:
            inv_freq = self._form.inv_freq
            if inv_freq is None:
                inv_freq = torch.zeros(len(self._form.order) // 2, dtype=torch.float64)
            turns, frequencies = angle_table(inv_freq), frequency_table(inv_freq)
            made = turns, frequencies, coefficient_table(inv_freq)
            self._shared.angles[key] = made[0].to(device), made[1].to(device), made[2].to(device)
        return self._shared.angles[key]

    def _workspace(self, variant: Variant, query: Tensor) -> Workspace:
        heads = self._layer.geometry.num_kv_heads
        key = query.device, variant.group, variant.head_dim, query.shape, heads
        if key not in self._shared.workspaces:
            blocks = 1
            if query.device.type == "cuda":
                blocks = torch.cuda.get_device_properties(query.device).multi_processor_count
            self._shared.workspaces[key] = new_workspace(variant, query, heads, blocks)
        return self._shared.workspaces[key]


def _seen(context: PackedContext) -> tuple[int, int]:
    """Return which packed tokens queries see; waits for the GPU."""
    last, first = context.state[0, [0, 4]].tolist()
    return first, max(first, last)


def _block(context: PackedContext, start: int, stop: int) -> PackedContext:
    """Return packed tokens start..stop-1 of every sequence, from the start of a page on."""
    pages = slice(start // PAGE_TOKENS, -(-stop // PAGE_TOKENS))
    state = context.state.clone()
    state[:, 0] = stop - start
    state[:, 3] += start
    table = context.pages.page_table[:, pages].contiguous()
    return replace(context, pages=replace(context.pages, page_table=table), state=state)
