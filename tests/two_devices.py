"""Two devices on a CPU: tensors that lie "elsewhere" hold ordinary ones, and operations refuse to
mix the two devices, as CUDA's do. What lies there is of type meta, whose guards do nothing.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map
from transformers import PreTrainedModel

FIRST, SECOND = torch.device("meta:0"), torch.device("meta:1")
_ACROSS = ("aten::_to_copy", "aten::copy_")  # may take tensors of several devices


class Elsewhere(Tensor):
    """A tensor on FIRST or SECOND."""

    held: Tensor
    __slots__ = ()

    @staticmethod
    def __new__(cls, held: Tensor, device: torch.device) -> Elsewhere:
        made = Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls,
            held.shape,
            strides=held.stride(),
            storage_offset=held.storage_offset(),
            dtype=held.dtype,
            device=device,
        )
        made.held = held
        return made

    def __repr__(self) -> str:
        return f"Elsewhere({self.held!r}, {self.device})"

    def tolist(self) -> Any:
        return self.held.tolist()

    @classmethod
    def __torch_dispatch__(
        cls, operation: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        return _run(operation, args, kwargs or {})


class _FromData(TorchFunctionMode):
    """Makes tensors of data on the CPU first; torch would make them of type meta, without data."""

    def __torch_function__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if function is torch.tensor and kwargs.get("device") is not None:
            device = kwargs.pop("device")
            return function(*args, **kwargs).to(device)
        if function in (Tensor.__getitem__, Tensor.__setitem__):
            places = args[1] if isinstance(args[1], tuple) else (args[1],)
            index = tuple(torch.tensor(p) if isinstance(p, list) else p for p in places)
            args = (args[0], index if len(index) > 1 else index[0], *args[2:])
        return function(*args, **kwargs)


@contextmanager
def two_devices() -> Iterator[None]:
    """Let tensors be made on FIRST and SECOND inside the block."""
    with torch.no_grad(), _FromData(), _TwoDevices():
        yield


class _TwoDevices(TorchDispatchMode):
    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # or every operation takes a detour

    def __torch_dispatch__(
        self, operation: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        return _run(operation, args, kwargs or {})


def _run(operation: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    name = operation.name().partition(".")[0]
    if name == "aten::_fused_sdp_choice":
        return 0  # plain mathematics
    wanted, parts = kwargs.get("device"), args + tuple(kwargs.values())
    if wanted is None and not any(isinstance(part, (Elsewhere, list, tuple)) for part in parts):
        return operation(*args, **kwargs)
    tensors = [part for part in tree_flatten((args, kwargs))[0] if isinstance(part, Tensor)]
    places = {t.device for t in tensors if isinstance(t, Elsewhere)}
    if any(t.is_meta and t.numel() and not isinstance(t, Elsewhere) for t in tensors):
        raise NotImplementedError(f"{name} is given a tensor that has no data")
    if name not in _ACROSS:
        loose = [t for t in tensors if not isinstance(t, Elsewhere) and t.dim()]
        is_index = name.startswith(("aten::index", "aten::_index"))
        if len(places) > 1 or (places and loose and not is_index):
            raise RuntimeError(
                f"Expected all tensors to be on the same device: {operation.name()}, "
                f"{[(tuple(t.shape), str(t.device)) for t in tensors]}"
            )
    place = next(iter(places), None) if wanted is None else torch.device(wanted)
    if name == "aten::copy_":
        place = args[0].device
    wrappers = {id(t.held): t for t in tensors if isinstance(t, Elsewhere)}
    if wanted is not None:
        kwargs = kwargs | {"device": torch.device("cpu")}
        kwargs.pop("pin_memory", None)
    plain_args, plain_kwargs = tree_map(_held, (args, kwargs))
    found = operation(*plain_args, **plain_kwargs)

    def back(part: Any) -> Any:
        if not isinstance(part, Tensor) or place is None or place.type != "meta":
            return part
        return wrappers.get(id(part)) if id(part) in wrappers else Elsewhere(part, place)

    return tree_map(back, found)


def _held(part: Any) -> Any:
    return part.held if isinstance(part, Elsewhere) else part


def spread(model: PreTrainedModel) -> PreTrainedModel:
    """Put a Llama's embeddings and first half on FIRST and the rest on SECOND, with accelerate's
    hooks, as its `dispatch_model` does.
    """
    from accelerate.hooks import AlignDevicesHook, add_hook_to_module

    inner: Any = model.model
    half = len(inner.layers) // 2
    places = {inner.embed_tokens: FIRST, inner.rotary_emb: FIRST, inner.norm: SECOND}
    places |= {model.lm_head: SECOND}
    places |= {layer: FIRST if i < half else SECOND for i, layer in enumerate(inner.layers)}
    for module, device in places.items():
        _put(module, device)
        for each in module.modules():
            hook = AlignDevicesHook(execution_device=device, skip_keys=["past_key_values"])
            hook.init_hook = lambda module: module  # type: ignore[method-assign]  # it lies there
            add_hook_to_module(each, hook)
    root = AlignDevicesHook(FIRST, io_same_device=True, skip_keys=["past_key_values"])
    return add_hook_to_module(model, root)


def _put(module: nn.Module, device: torch.device) -> None:
    for each in module.modules():
        for name, part in list(each.named_parameters(recurse=False)):
            held = Elsewhere(part.detach().clone(), device)
            each._parameters[name] = nn.Parameter(held, requires_grad=False)
        for name, part in list(each.named_buffers(recurse=False)):
            each._buffers[name] = Elsewhere(part.detach().clone(), device)
