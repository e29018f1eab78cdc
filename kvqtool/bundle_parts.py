"""Read the parts of a bundle back from metadata and tensors, and refuse what makes none."""

from __future__ import annotations

import re
from dataclasses import fields
from typing import Any, Final

import torch
from torch import Tensor

from kvqtool.codebook import Codebook
from kvqtool.memory import LayerGeometry
from kvqtool.side import EXACT, WIDTHS, QuantSpec
from kvqtool.spec import KvSpec, parse_spec

_FIELDS: Final = {
    "name": str,
    "architecture": str,
    "num_layers": int,
    "layers": list,
    "vocab_size": int,
    "max_context": int,
    "tokenizer_sha256": str,
    "rope_sha256": str,
}
_SIZES: Final = {field.name for field in fields(LayerGeometry)}
_LONGEST_SPEC: Final = 200
_TENSOR: Final = re.compile(
    r"layers\.(0|[1-9][0-9]{0,5})\."
    r"(?:key\.(?:levels|decode_levels|lower|upper|feedback|order|query_norm)"
    r"|value\.(?:levels|decode_levels|feedback|order))"
)


def read_spec(text: Any) -> KvSpec:
    """Parse a spec from a file; ValueError for what cannot be one."""
    if len(text) > _LONGEST_SPEC:
        raise ValueError("the spec")
    return parse_spec(text)


def read_layer_specs(texts: Any, spec: KvSpec, layers: list[int]) -> dict[int, KvSpec]:
    """Return the schemes of layers that have their own; ValueError where they do not fit in."""
    specs = {int(layer): read_spec(text) for layer, text in texts.items()}
    is_whole = sorted(specs) == (layers if spec.mixed else [])
    if not is_whole or any(
        each.mixed or _in_common(each) != _in_common(spec) for each in specs.values()
    ):
        raise ValueError("the layers' specs")
    return specs


def _in_common(spec: KvSpec) -> tuple[int, int, bool, bool]:
    """Return what all layers of a bundle share."""
    is_exact = spec.key.method == EXACT
    return spec.sink_tokens, spec.residual_length, spec.key.pre_rope, is_exact


def check_identity(model: Any) -> None:
    """Raise ValueError or KeyError for what is no model's identity."""
    for name, kind in _FIELDS.items():
        if type(model[name]) is not kind:
            raise ValueError(f"the model's {name}")
    for layer in model["layers"]:
        if not isinstance(layer, dict) or layer.keys() != _SIZES:
            raise ValueError("the model's layers")
        if not all(type(size) is int and size > 0 for size in layer.values()):
            raise ValueError("the model's layers")


def layers_of(tensors: dict[str, Tensor]) -> list[int]:
    """Return the layers that tensors belong to; ValueError for one that belongs nowhere."""
    layers = set()
    for name, tensor in tensors.items():
        match = _TENSOR.fullmatch(name)
        dtype = torch.int16 if name.endswith(".order") else torch.float16
        if match is None or tensor.dtype != dtype:
            raise ValueError(f"the tensor {name}")
        layers.add(int(match[1]))
    return sorted(layers)


def read_codebook(tensors: dict[str, Tensor], layer: int, side: str, spec: KvSpec) -> Codebook:
    """Return one side's codebook; KeyError or ValueError where the tensors make none."""
    quant = spec.side(side)
    prefix = f"layers.{layer}.{side}"
    levels = tensors[f"{prefix}.levels"].float()
    decoded = tensors.get(f"{prefix}.decode_levels", levels).float()
    lower, upper = (
        tensors[f"{prefix}.{end}"].float() if quant.per_channel else None
        for end in ("lower", "upper")
    )
    if not quant.per_channel and {f"{prefix}.lower", f"{prefix}.upper"} & tensors.keys():
        raise ValueError(f"the range of layer {layer} {side}")
    widths = WIDTHS if quant.is_adaptive else (quant.bits,)
    shape: tuple[int, ...] = (0 if quant.method == EXACT else sum(1 << each for each in widths),)
    if quant.channel_levels and lower is not None:
        shape = (len(lower), *shape)
    parts = [part for part in (levels, decoded, lower, upper) if part is not None]
    if (
        not all(torch.isfinite(part).all() for part in parts)
        or not tuple(levels.shape) == tuple(decoded.shape) == shape
        or not _ascend(levels, widths)
    ):
        raise ValueError(f"the codebook of layer {layer} {side}")
    if (
        lower is not None
        and upper is not None
        and (lower.dim() != 1 or lower.shape != upper.shape or (lower > upper).any())
    ):
        raise ValueError(f"the range of layer {layer} {side}")
    norm = tensors[f"{prefix}.query_norm"].float() if _has_norm(spec, side) else None
    if norm is None and f"{prefix}.query_norm" in tensors:
        raise ValueError(f"the query norm of {prefix}")
    if norm is not None and (norm.dim() != 1 or not (norm > 0).all() or norm.isinf().any()):
        raise ValueError(f"the query norm of {prefix}")
    feedback, order = _feedback(tensors, prefix, quant)
    return Codebook(levels, decoded, lower, upper, feedback, order, norm)


def _has_norm(spec: KvSpec, side: str) -> bool:
    return side == "key" and spec.needs_queries


def _ascend(levels: Tensor, widths: tuple[int, ...]) -> bool:
    """Whether the levels of each width ascend, where those of several lie end to end."""
    parts = torch.split(levels, [1 << each for each in widths], dim=-1) if levels.numel() else ()
    return all(bool((part.diff(dim=-1) >= 0).all()) for part in parts)


def _feedback(
    tensors: dict[str, Tensor], prefix: str, quant: QuantSpec
) -> tuple[Tensor, Tensor] | tuple[None, None]:
    """Return what compensation needs; KeyError or ValueError where the tensors do not give it."""
    names = f"{prefix}.feedback", f"{prefix}.order"
    if not quant.compensated:
        if tensors.keys() & set(names):
            raise ValueError(f"the feedback of {prefix}")
        return None, None
    feedback, order = tensors[names[0]].float(), tensors[names[1]]
    heads, width = order.shape
    every = torch.arange(width).expand(heads, width)
    if (
        tuple(feedback.shape) != (heads, width, width)
        or not torch.isfinite(feedback).all()
        or not torch.equal(order.long().sort(dim=1).values, every)
    ):
        raise ValueError(f"the feedback of {prefix}")
    return feedback, order
