"""Several processes that share one command's work: which of them this is, and sums over all.

`torchrun` says so in the environment, and only here is it read. torch is imported when processes
meet, so that a command can ask who it is before it needs a tensor.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Final, Literal

from kvqtool.errors import BundleError, InputError, KvqError, RunError, SpecError

if TYPE_CHECKING:
    from torch import Tensor

Operation = Literal["SUM", "MIN", "MAX"]
_SHARED_ERRORS: Final = {kind.__name__: kind for kind in (SpecError, InputError, BundleError)}
# Marks an exception of which every process knows.
_KNOWN: Final = "is_known_to_all_ranks"
# Characters of a failure's text that the other processes get, and room for them as escaped JSON.
_TEXT_CHARACTERS: Final = 300
_TEXT_BYTES: Final = 4096
# A share may take hours; a process that dies is noticed by torchrun, which ends the others.
_PATIENCE: Final = timedelta(days=1)


@dataclass(frozen=True)
class Ranks:
    """One process among those that share the work.

    Args:
        rank: its number; 0 writes and prints.
        world_size: how many there are.
        local_rank: its number on this machine, which is that of its GPU.
        local_size: how many there are on this machine.

    Example: 5 windows, world_size 2 -> rank 0 takes windows 0, 2, 4, rank 1 takes 1, 3.
    """

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    local_size: int = 1

    @property
    def is_first(self) -> bool:
        """Whether this process writes and prints."""
        return self.rank == 0

    @property
    def is_alone(self) -> bool:
        """Whether there is nobody to share with."""
        return self.world_size == 1

    def share(self, total: int) -> range:
        """Return the numbers below `total` that fall to this process.

        Raises:
            InputError: when there is not one for each process.
        """
        if total < self.world_size:
            raise InputError(
                f"{self.world_size} processes cannot share {total} windows; "
                f"start {total} or fewer, or use more windows"
            )
        return range(self.rank, total, self.world_size)

    def reduce(self, tensor: Tensor, operation: Operation = "SUM") -> Tensor:
        """Return the sum, least or greatest of all processes' tensors, element by element.

        Args:
            tensor: of the same shape and dtype everywhere; left as it is.
            operation: `SUM`, `MIN` or `MAX`.
        """
        if self.is_alone:
            return tensor
        from torch import distributed

        found = tensor.clone()
        distributed.all_reduce(found, getattr(distributed.ReduceOp, operation))
        return found

    def gather(self, tensor: Tensor) -> Tensor:
        """Return all processes' tensors in order of rank, (world_size, ...).

        Args:
            tensor: of the same shape and dtype everywhere.
        """
        if self.is_alone:
            return tensor[None]
        from torch import distributed

        # The sum of what is zero elsewhere: one operation under every release of torch and backend.
        found = tensor.new_zeros(self.world_size, *tensor.shape)
        found[self.rank] = tensor
        distributed.all_reduce(found)
        return found

    @contextmanager
    def together(self) -> Iterator[None]:
        """Wait for all processes at the end of the block; raise in each what failed in any.

        Blocks nest: what failed in an inner one is known to all and ends the outer ones at once.
        """
        if self.is_alone:
            yield
            return
        failure: Exception | None = None
        try:
            yield
        except Exception as error:  # raised again below, once the others know
            failure = error
        is_known = failure is not None and _KNOWN in failure.__dict__
        is_over = is_known or not _have_met()
        said = [] if is_over else self._failures(failure)
        if failure is None and said:
            rank, (kind, text) = said[0]
            failure = _SHARED_ERRORS.get(kind, RunError)(f"process {rank}: {text}")
        if failure is not None:
            failure.__dict__[_KNOWN] = True
            raise failure

    def _failures(self, failure: Exception | None) -> list[tuple[int, tuple[str, str]]]:
        """Return every process's failure as (rank, (kind, text)), in order."""
        import torch

        rows = torch.zeros(self.world_size, _TEXT_BYTES, dtype=torch.uint8)
        if failure is not None:
            kind = type(failure).__name__
            text = str(failure) if isinstance(failure, KvqError) else f"{kind}: {failure}"
            said = json.dumps([kind, text[:_TEXT_CHARACTERS]]).encode()
            rows[self.rank, : len(said)] = torch.frombuffer(bytearray(said), dtype=torch.uint8)
        rows = self.reduce(rows)
        texts = [bytes(row.tolist()).rstrip(b"\0") for row in rows]
        return [(rank, tuple(json.loads(text))) for rank, text in enumerate(texts) if text]


ALONE: Final = Ranks()


def read_ranks() -> Ranks:
    """Return what torchrun says of this process; alone without it.

    Raises:
        InputError: when the environment contradicts itself.
    """
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
    texts = [os.environ.get(name, "") for name in names]
    if texts[1] in ("", "1"):
        return ALONE
    if not all(text.isdecimal() for text in texts) or not int(texts[0]) < int(texts[1]):
        said = ", ".join(f"{name}={text}" for name, text in zip(names, texts, strict=True))
        raise InputError(f"{said} is not what torchrun sets; use torchrun, or unset WORLD_SIZE")
    return Ranks(*map(int, texts))


def join_ranks(ranks: Ranks, *, on_gpu: bool) -> None:
    """Meet the other processes: over NCCL for tensors on a GPU, over gloo for those on the CPU.

    Args:
        ranks: what `read_ranks` returned.
        on_gpu: whether every process has the GPU of its local rank to itself.
    """
    if ranks.is_alone:
        return
    import torch
    from torch import distributed

    if on_gpu:
        torch.cuda.set_device(ranks.local_rank)
    backend = "cpu:gloo,cuda:nccl" if on_gpu else "gloo"
    distributed.init_process_group(
        backend, rank=ranks.rank, world_size=ranks.world_size, timeout=_PATIENCE
    )


def _have_met() -> bool:
    """Tell whether the processes have met; without loading torch, for then they have not."""
    distributed = sys.modules.get("torch.distributed")
    return distributed is not None and distributed.is_initialized()


def leave_ranks(ranks: Ranks) -> None:
    """Part from the other processes, if they met."""
    if not ranks.is_alone and _have_met():
        from torch import distributed

        distributed.destroy_process_group()
