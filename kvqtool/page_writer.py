"""Write one layer's pages from the states a model computed, by kernels: the codec's bits."""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor

from kvqtool.code_tables import CodeTables, code_tables, unsupported
from kvqtool.codebook import Codebook
from kvqtool.cuda import Launcher, run_on_gpu
from kvqtool.hadamard import rotate_heads
from kvqtool.packing import Packed, pack
from kvqtool.reader import PageReader
from kvqtool.rows import Pair
from kvqtool.spec import KvSpec

_DTYPES: Final = (torch.float16, torch.bfloat16)


class PageWriter:
    """What writes one layer's pages; tables are made when states first say where they lie."""

    def __init__(
        self,
        spec: KvSpec,
        books: tuple[Codebook, Codebook],
        reader: PageReader,
        run: Launcher | None = None,
    ) -> None:
        """Start without tables.

        Args:
            spec: the scheme.
            books: the layer's codebooks.
            reader: what reads the layer's pages.
            run: what runs the kernels; None for the GPU, and only there.
        """
        self.spec = spec
        self.books = books
        self.reader = reader
        self._run = run
        self._code: CodeTables | None = None

    @property
    def run(self) -> Launcher:
        """What runs kernels."""
        return self._run or run_on_gpu

    def can_take(self, states: Tensor) -> bool:
        """Whether the kernels know the scheme and run where states lie."""
        is_there = self._run is not None or states.is_cuda
        return is_there and states.dtype in _DTYPES and unsupported(self.spec) is None

    def pack(self, states: Pair, turns: Pair | None) -> Packed:
        """Return the pages of whole pages of tokens.

        Args:
            states: keys after RoPE and values, (batch, num_kv_heads, tokens, head_dim).
            turns: cosine and sine of each pair, (tokens, batch, width / 2) float32; None where keys
                are not rotated.
        """
        key, value = (part.contiguous() for part in states)
        variant = self.reader.variant(key.shape[1], key)
        tables = self.reader.tables_on(key.device)
        if self.spec.value.rotated:
            value = rotate_heads(value.float())
        places, code = self.turns(turns, key, key.shape[2]), self.code_for(key)
        return pack((key, value), places, code, tables, variant, self.run)

    def code_for(self, states: Tensor) -> CodeTables:
        """Return what finding codes needs, where states (batch, heads, ..., head_dim) lie."""
        if self._code is None:
            books = self.books[0].to(states.device), self.books[1].to(states.device)
            channels = states.shape[1] * states.shape[-1]
            self.books, self._code = books, code_tables(self.spec, books, channels)
        return self._code

    def turns(self, turns: Pair | None, states: Tensor, tokens: int) -> Tensor:
        """Return cosines and sines by place, (batch, tokens, head_dim / 2, 2) float32.

        Args:
            turns: as in `pack`.
            states: (batch, num_kv_heads, any, head_dim).
            tokens: how many.
        """
        batch, _, _, head_dim = states.shape
        fixed = torch.zeros(batch, tokens, head_dim // 2, 2, device=states.device)
        fixed[..., 0] = 1.0
        if turns is not None:
            for i, part in enumerate(turns):
                fixed[..., : part.shape[-1], i] = part.transpose(0, 1)
        return fixed

    @property
    def tensors(self) -> list[Tensor]:
        """Every tensor allocated for tables, the codebooks' own aside."""
        own = {id(part) for book in self.books for part in vars(book).values()}
        made = [] if self._code is None else self._code.tensors
        return [part for part in made if id(part) not in own]
