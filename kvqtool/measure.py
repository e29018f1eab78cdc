"""Predicted against measured: a planned cache allocated here, or a whole forward run."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import torch
from torch import Tensor

from kvqtool.attach import attach
from kvqtool.bundle import Bundle
from kvqtool.errors import InputError
from kvqtool.forward import hidden_states, next_logits
from kvqtool.layers import CacheModel
from kvqtool.live import watch
from kvqtool.load import Load
from kvqtool.memory import Outliers
from kvqtool.packed import found_in
from kvqtool.peaks import WORKSPACE_BYTES
from kvqtool.probe import probe
from kvqtool.seam import LayerSeam, Seam
from kvqtool.store import LayerStore
from kvqtool.synthetic import synthetic_bundle

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_CHUNK: Final = 4096


@dataclass(frozen=True)
class Comparison:
    """One figure, planned and measured."""

    name: str
    planned_bytes: int
    measured_bytes: int

    @property
    def error(self) -> float:
        """The plan's error as a share of what was measured."""
        if self.measured_bytes == 0:
            return 0.0 if self.planned_bytes == 0 else math.inf
        return self.planned_bytes / self.measured_bytes - 1


def measure_cache(load: Load, context: int, device: torch.device) -> list[Comparison]:
    """Allocate a planned cache with random states and compare its bytes.

    Args:
        load: the model at work, on one GPU.
        context: tokens of each sequence.
        device: where to allocate.

    Raises:
        InputError: for several GPUs, and for bits that follow from attention.
    """
    _check_single(load)
    if load.spec.adaptive is not None:
        raise InputError("bits by token need attention; measure them with --measure forward")
    cached = load.forward(0, load.work.batch).cache
    dtype, batch = getattr(torch, cached.dtype), cached.batch
    generator = torch.Generator(device).manual_seed(0)
    planned = given = measured = 0
    for index, layer in enumerate(cached.layers):
        if not layer.is_packed:
            continue
        spec, geometry = layer.own_spec or cached.spec, layer.geometry
        bundle = synthetic_bundle(spec, {index: geometry})
        seam = LayerSeam(index, geometry, None, True, None, None, "", window=layer.window)
        store = LayerStore(spec, bundle.codebooks_of(index), seam)
        for start in range(0, context, _CHUNK):
            tokens = min(_CHUNK, context - start)
            key, value = (
                torch.randn(
                    (batch, geometry.num_kv_heads, tokens, width),
                    device=device,
                    dtype=dtype,
                    generator=generator,
                )
                for width in (geometry.key_dim, geometry.value_dim)
            )
            store.append(key, value, _no_angles)
            store.drop_unseen()
        outliers = found_in(store.bodies)
        planned += sum(cached.layer_bytes(layer, context).values())
        given += sum(cached.layer_bytes(layer, context, outliers).values())
        measured += sum(tensor.nbytes for held in store.tensors.values() for tensor in held)
    return [
        Comparison("packed cache, outliers as expected", planned, measured),
        Comparison("packed cache, outliers as found", given, measured),
    ]


def measure_forward(load: Load, context: int, device: torch.device) -> list[Comparison]:
    """Run a model of random weights with the planned cache and compare its peaks.

    Args:
        load: the model at work, on one GPU.
        context: tokens of each prompt.
        device: where to run.
    """
    _check_single(load)
    if any(layer.own_spec for layer in load.shape.layers):
        raise InputError("a bundle with a scheme for each layer is measured with --measure cache")
    model = random_model(load, device)
    seam = probe(model)
    layers = {layer.index: layer.geometry for layer in seam.packed}
    return run_forward(load, context, (model, seam), synthetic_bundle(load.spec, layers))


def random_model(load: Load, device: torch.device) -> PreTrainedModel:
    """Return a model of random weights with a planned model's config, on a device."""
    from transformers import AutoConfig, AutoModelForCausalLM

    fields = {key: value for key, value in load.shape.config.stated.items() if key != "model_type"}
    config = AutoConfig.for_model(load.shape.config.model_type, **fields)
    dtype = getattr(torch, load.work.dtype)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with device:
            model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=dtype)
    finally:
        torch.set_default_dtype(before)
    return model.eval()


@torch.no_grad()
def run_forward(
    load: Load, context: int, probed: tuple[PreTrainedModel, Seam], bundle: Bundle
) -> list[Comparison]:
    """Read a prompt in chunks, generate one token, and set every peak beside the plan's."""
    model, seam = probed
    batch, chunk = load.work.batch, load.work.prefill_chunk or context
    forward, device = load.forward(0, batch), model.device
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    generator = torch.Generator().manual_seed(0)
    vocabulary = load.shape.trunk.vocabulary
    ids = torch.randint(vocabulary, (batch, context + 1), generator=generator).to(device)
    beside = torch.cuda.memory_allocated(device) - weights if device.type == "cuda" else 0
    with attach(model, bundle, seam=seam, read_path="materialise") as session:
        cache = session.new_cache(bundle)
        with watch(device) as prefill:
            for start in range(0, context, chunk):
                part = {"input_ids": ids[:, start : min(start + chunk, context)]}
                hidden_states(model, part, cache)
        held = cache.nbytes
        with watch(device) as decode:
            next_logits(model, ids[:, -1:], cache)
    outliers = [found_in(store.bodies) for store in cache.stores]
    planned = forward.prefill(context), forward.decode(context, context + 1)
    on_gpu = WORKSPACE_BYTES + bundle.bundle_bytes if device.type == "cuda" else 0
    cached = forward.cache
    return [
        Comparison("weights", planned[0].weights, weights),
        Comparison(
            "packed cache, outliers as expected", _packed(cached, context + 1), cache.nbytes
        ),
        Comparison(
            "packed cache, outliers as found", _packed(cached, context + 1, outliers), cache.nbytes
        ),
        Comparison("beside weights and cache", on_gpu, beside),
        Comparison(
            "prefill peak", planned[0].nbytes + on_gpu, beside + weights + prefill.peak_bytes
        ),
        Comparison(
            "decode peak", planned[1].nbytes + on_gpu, beside + weights + held + decode.peak_bytes
        ),
    ]


def _packed(cached: CacheModel, tokens: int, found: list[Outliers] | None = None) -> int:
    """Return the planned bytes of packed layers and angles, with outliers as found or expected."""
    layers = [layer for layer in cached.layers if layer.is_packed]
    if found is None:
        found = []
        for layer in layers:
            spec = layer.own_spec or cached.spec
            rows = layer.parts(spec, tokens)[1] * cached.batch
            found.append(layer.outliers(spec, rows, bound=False))
    return cached.bytes_given(tokens, found)


def _check_single(load: Load) -> None:
    if load.work.read_path != "materialise":
        raise InputError("--measure runs the torch read path; drop --read-path")
    if load.work.gpus > 1:
        raise InputError("--measure runs on one device; drop --tp, --pp and --context-parallel")


def _no_angles(start: int, stop: int) -> tuple[Tensor, Tensor]:
    raise AssertionError("states without a rotation ask for no angles")
