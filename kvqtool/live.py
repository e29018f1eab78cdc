"""Bytes that are alive while code runs: torch's own count on a GPU, tensors traced on a CPU."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes:
    """What a block of code held: `peak_bytes` at its highest point, above what was there before."""

    def __init__(self) -> None:
        """Start at nothing."""
        self.peak_bytes = 0


def forget_peak(device: torch.device) -> None:
    """Let `peak_bytes` count from here."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def peak_bytes(device: torch.device) -> int | None:
    """Return the most that tensors took on a GPU at once, or None elsewhere."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None


@contextmanager
def watch(device: torch.device) -> Iterator[LiveBytes]:
    """Watch a block of code.

    On a GPU this is `max_memory_allocated`, caches of the allocator left out. On a CPU it is the
    sum of the storages that torch operations return, as long as anything refers to them; what an
    operation takes inside itself is not seen.
    """
    live = LiveBytes()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        yield live
        torch.cuda.synchronize(device)
        live.peak_bytes = torch.cuda.max_memory_allocated(device) - before
        return
    with _Tracer() as tracer:
        yield live
    live.peak_bytes = tracer.peak


class _Tracer(TorchDispatchMode):
    """Counts the storages of every tensor that operations make."""

    def __init__(self) -> None:
        super().__init__()
        self.peak = self._live = 0
        self._sizes: dict[int, int] = {}
        self._references: dict[int, Any] = {}

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        given = {_identity(leaf) for leaf in tree_leaves((args, kwargs)) if _is_tensor(leaf)}
        result = function(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if _is_tensor(leaf) and _identity(leaf) not in given:
                self._note(leaf)
        self.peak = max(self.peak, self._live)
        return result

    def _note(self, tensor: Tensor) -> None:
        storage, identity = tensor.untyped_storage(), _identity(tensor)
        if identity not in self._sizes and storage.nbytes():
            self._sizes[identity] = storage.nbytes()
            self._live += storage.nbytes()
            self._references[identity] = weakref.ref(storage, self._forget(identity))

    def _forget(self, identity: int) -> Callable[[Any], None]:
        def forget(_: Any) -> None:
            self._live -= self._sizes.pop(identity, 0)
            self._references.pop(identity, None)

        return forget


def _is_tensor(leaf: Any) -> bool:
    return isinstance(leaf, Tensor)


def _identity(tensor: Tensor) -> int:
    identity: int = tensor.untyped_storage()._cdata
    return identity
