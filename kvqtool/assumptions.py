"""What a plan rests on, in sentences."""

from __future__ import annotations

from kvqtool.amounts import in_gib
from kvqtool.layers import PACKED_KINDS
from kvqtool.load import FRAGMENTATION, Load
from kvqtool.peaks import WORKSPACE_BYTES
from kvqtool.scratch import READ_PATH

_OWN = {
    "latent": "latent attention (MLA) keeps the model's own cache: kvqtool does not pack it yet",
    "indexed": "latent attention with an indexer keeps the model's own cache",
    "linear": "linear-attention and state-space layers keep states that do not grow",
    "hybrid": "layers of both attention and state space keep the model's own cache",
    "shared": "layers that read another layer's cache have none of their own",
}


def assumptions(load: Load, context: int) -> list[str]:
    """Return the sentences for one spec at one context."""
    work, shape, spec = load.work, load.shape, load.spec
    whole = "one call" if work.context_parallel == 1 else "a GPU's share a call"
    chunk = f"{work.prefill_chunk} tokens a call" if work.prefill_chunk else whole
    path = READ_PATH if work.read_path == "materialise" else "kernels (fused), by bounds"
    margin = f"{100 * FRAGMENTATION:g}% of the peak for the allocator"
    lines = [
        f"weights, sinks, recent window, fp and the model's own caches are held in {work.dtype}",
        f"the read path is {path}; prompts are read in {chunk}, logits of the last token only",
        f"margins: {in_gib(work.reserve_bytes)} for the GPU's context, {margin}, "
        f"{in_gib(WORKSPACE_BYTES)} for matrix multiplication",
        _weights(load),
    ]
    if shape.trunk.score_bytes:
        lines.append(f"{shape.config.model_type} attends eagerly: every score is written out")
    kinds = dict.fromkeys(layer.kind for layer in shape.layers)
    lines += [_OWN[kind] for kind in kinds if kind in _OWN]
    if not any(kind in PACKED_KINDS for kind in kinds):
        lines.append(f"no layer of {shape.name} is packed, so every spec costs the same")
    if spec.mixed and not any(layer.own_spec for layer in shape.layers):
        lines.append(f"{spec.name}: its layers differ and together keep within these bytes")
    if spec.key.per_channel and spec.key.outlier_fraction:
        share = f"{spec.key.outlier_fraction * 100:g}%"
        lines.append(
            f"keys hold {share} outliers; other text may hold more, up to cache_bytes_bound"
        )
    if spec.adaptive is not None:
        bits = f"{spec.adaptive.planned_bits:g} bits"
        lines.append(
            f"{spec.name}: a text decides bits, codes are counted at {bits}; see --code-bits"
        )
        if spec.adaptive.shadow:
            lines.append("the copy of values in host memory is not counted")
    if any(layer.angles and layer.angles.table_after is not None for layer in shape.layers):
        lines.append("where positions do not give a model's angles, the angles are stored")
    lines += _sharing(load)
    limit = shape.max_context
    if limit is not None and context + work.new_tokens > limit:
        asked = context + work.new_tokens
        lines.append(f"context {asked} is beyond the {limit} tokens the model was made for")
    return lines


def _sharing(load: Load) -> list[str]:
    """Return what a plan for several GPUs rests on."""
    work, lines = load.work, []
    if work.context_parallel > 1:
        lines.append(
            f"each of {work.context_parallel} GPUs keeps its share of every sequence's tokens, and "
            "all else of the model; figures are those of the last one, to which new tokens go"
        )
    if work.gpus > 1:
        lines.append(
            "figures are those of the fullest GPU; matrices are divided evenly, vectors copied, "
            "key/value heads divided until each GPU has one, latents copied; no buffers of "
            "communication are counted"
        )
    return lines


def _weights(load: Load) -> str:
    weights = load.shape.weights
    if weights is None:
        return "the weights are unknown: the figures are without them; see --weights"
    if weights.source == "estimate":
        also = ", without parts for images and sound" if load.shape.config.is_multimodal else ""
        counted = f"weights are counted from the config, as {load.work.dtype} numbers{also}"
        return f"{counted}; a quantized checkpoint takes less, see --weights"
    if weights.source == "stated":
        return "weights are what --weights says"
    if weights.source == "none":
        return "weights are left out of every figure, as --weights says; speed is not estimated"
    return "weights are those of the safetensors files beside the config"
