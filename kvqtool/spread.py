"""Models whose layers lie on several GPUs, by a device map: what can be followed, and where they
begin.
"""

from __future__ import annotations

from importlib.util import find_spec
from itertools import permutations
from typing import TYPE_CHECKING, Final

import torch

from kvqtool.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_TRIED_BYTES: Final = (16, 4096, 1 << 22)  # of copies from each GPU to each other


def check_device_map(device_map: str | None, device: str) -> None:
    """Refuse a device map that cannot be followed, before anything is loaded.

    Raises:
        InputError: when it is unknown, contradicts the device, or accelerate is missing.
    """
    if device_map is None:
        return
    if device_map != "auto":
        raise InputError(f"device map {device_map!r} is unknown; use auto")
    if device != "auto":
        raise InputError(f"a device map leaves no choice of device; drop {device!r} or the map")
    if find_spec("accelerate") is None:
        raise InputError(
            "a device map needs the accelerate package; install it: pip install 'kvqtool[sharded]'"
        )


def input_device(model: PreTrainedModel, expected: torch.device) -> torch.device:
    """Return where a spread model takes its token ids.

    Raises:
        InputError: when it does not fit the GPUs, or what one GPU sends another arrives changed.
    """
    places = {str(place) for place in getattr(model, "hf_device_map", {}).values()}
    if expected.type == "cuda" and places & {"cpu", "disk"}:
        raise InputError(
            "the model does not fit the GPUs here and kvqtool runs no layers from elsewhere; "
            "use more GPUs, a smaller --dtype, or --device cpu"
        )
    check_copies({part.device for part in model.parameters() if part.is_cuda})
    return next(model.get_input_embeddings().parameters()).device


def check_copies(devices: set[torch.device]) -> None:
    """Refuse GPUs between which copies arrive changed, as they do without an error where a machine
    offers peer access that its IOMMU then breaks: every layer behind would compute with garbage.

    Raises:
        InputError: naming the first pair.
    """
    for source, target in permutations(sorted(devices, key=str), 2):
        for size in _TRIED_BYTES:
            sent = torch.arange(size // 8)
            if not torch.equal(_passed_on(sent, source, target), sent):
                raise InputError(
                    f"copies from {source} to {target} arrive changed: this machine's peer access "
                    "is broken; use one GPU, or turn its IOMMU off"
                )


def _passed_on(sent: torch.Tensor, source: torch.device, target: torch.device) -> torch.Tensor:
    """Return a tensor as it is after a copy from one GPU to another."""
    return sent.to(source).to(target).cpu()
