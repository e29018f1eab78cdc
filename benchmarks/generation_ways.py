"""Ways to hold a cache while a model generates: transformers' own and this package's, timed
alike.
"""

from __future__ import annotations

import statistics
import time
from contextlib import closing
from dataclasses import dataclass
from typing import Any, Final

import torch
from random_llama import bundle_of, fill, random_llama
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel, QuantizedCache, StaticCache

from kvqtool.attach import attach
from kvqtool.bundle import Bundle
from kvqtool.decode import Decoder
from kvqtool.forward import read_prompt
from kvqtool.live import forget_peak, peak_bytes
from kvqtool.sampling import Sampling
from kvqtool.seam import Seam
from kvqtool.usage import kernel_of

WARM_UP: Final = 8  # steps left out: compiling and capturing
STOCK: Final = ("dynamic", "static", "quantized")
PACKED: Final = ("eager", "graph")
# Four bits of HQQ, by groups along a token's channels, as its documentation asks for.
HQQ: Final[dict[str, Any]] = {"backend": "hqq", "nbits": 4, "axis_key": 1, "axis_value": 1}


@dataclass(frozen=True)
class Case:
    """What is timed.

    Args:
        way: one of STOCK or PACKED.
        batch: sequences.
        context: tokens of the prompt.
        steps: tokens that are timed behind it.
        spec: the scheme, of PACKED.
        chunk: tokens of the prompt that a call reads, of PACKED; None for all.
        fill: tokens of synthetic states put into the cache at once; None to read a prompt.
    """

    way: str
    batch: int
    context: int
    steps: int
    spec: str
    chunk: int | None = None
    fill: int | None = None

    @property
    def all_steps(self) -> int:
        """Steps that are taken."""
        return WARM_UP + self.steps


class Ways:
    """One model of random weights, and every way to generate from it."""

    def __init__(self, shape: str, dtype: torch.dtype, device: torch.device) -> None:
        """Make the model."""
        self.device = device
        made: tuple[PreTrainedModel, Seam] = random_llama(shape, dtype, device)
        self.model, self.seam = made
        self.like = self.model.lm_head.weight
        self._bundles: dict[str, Bundle] = {}

    @torch.no_grad()
    def run(self, case: Case) -> dict[str, Any]:
        """Read a prompt and generate on greedily; return what was measured."""
        return self._packed(case) if case.way in PACKED else self._stock(case)

    def _stock(self, case: Case) -> dict[str, Any]:
        cache, step = self._stock_cache(case), self.model.forward
        is_static = case.way == "static"
        if is_static:
            step = torch.compile(step, mode="reduce-overhead", fullgraph=True)
        before = self._now()
        if case.fill:
            self._fill_stock(cache, case)
            token = self._ids(case.batch, 1)
        else:
            ids = self._ids(case.batch, case.context)
            out = self.model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
            token = out.logits[:, -1].argmax(-1)[:, None]
            del out
        prompt = self._prompt(before)
        seconds, started = [], self._now()
        for number in range(case.all_steps):
            inputs = {"input_ids": token, "past_key_values": cache, "use_cache": True}
            if is_static:
                inputs["position_ids"] = torch.full_like(token, case.context + number)
            token = step(**inputs).logits[:, -1].argmax(-1)[:, None]
            token.tolist()
            seconds.append(time.perf_counter() - started)
            started = time.perf_counter()
            if is_static:
                token = token.clone()
        return prompt | self._steps(seconds, case.batch) | {"cache_bytes": held_bytes(cache)}

    def _stock_cache(self, case: Case) -> Any:
        config = self.model.config
        if case.way == "static":
            return StaticCache(config=config, max_cache_len=case.context + case.all_steps + 1)
        if case.way == "quantized":
            return QuantizedCache(config=config, **HQQ)
        return DynamicCache(config=config)

    def _packed(self, case: Case) -> dict[str, Any]:
        sampling = Sampling(max_new_tokens=1 + case.all_steps)
        if case.spec not in self._bundles:
            self._bundles[case.spec] = bundle_of(self.model, self.seam, case.spec)
        bundle = self._bundles[case.spec]
        with attach(self.model, bundle, seam=self.seam) as session:
            cache, before = session.new_cache(bundle), self._now()
            if case.fill:
                fill(cache, self.seam, (case.batch, case.context), case.fill, self.like)
                shape = case.batch, self.model.config.vocab_size
                logits = torch.zeros(shape, device=self.device)
            else:
                ids = self._ids(case.batch, case.context)
                logits = read_prompt(self.model, ids, cache, case.chunk)
            prompt = self._prompt(before)
            decoder, seconds = Decoder(self.model, cache, sampling, case.way), []
            with closing(decoder.tokens(logits)) as tokens:
                next(tokens)
                started = time.perf_counter()
                for _ in tokens:
                    seconds.append(time.perf_counter() - started)
                    started = time.perf_counter()
            report = {"cache_bytes": cache.nbytes, "kernel": kernel_of(cache)}
            steps = self._steps(seconds, case.batch)
            return prompt | steps | report | decoder.report.as_json()

    def _fill_stock(self, cache: Any, case: Case) -> None:
        shape = self.seam.packed[0].geometry
        size = case.batch, shape.num_kv_heads, case.context, shape.key_dim
        for layer in range(len(self.seam.packed)):
            key, value = (
                torch.empty(size, dtype=self.like.dtype, device=self.device).normal_()
                for _ in range(2)
            )
            cache.update(key, value, layer)

    def _ids(self, batch: int, tokens: int) -> Tensor:
        random = torch.Generator().manual_seed(1)
        size = (batch, tokens)
        ids = torch.randint(self.model.config.vocab_size, size, generator=random)
        return ids.to(self.device)

    def _prompt(self, before: float) -> dict[str, Any]:
        found = {
            "prompt_seconds": self._now() - before,
            "prompt_peak_bytes": peak_bytes(self.device),
        }
        forget_peak(self.device)
        return found

    def _steps(self, seconds: list[float], batch: int) -> dict[str, Any]:
        timed = seconds[WARM_UP:]
        return {
            "warm_up_seconds": sum(seconds[:WARM_UP]),
            "tokens_per_second": batch * len(timed) / sum(timed),
            "step_seconds": statistics.median(timed),
            "slowest_step_seconds": max(timed),
            "peak_bytes": peak_bytes(self.device),
            "device_bytes": self._device_bytes(),
        }

    def _device_bytes(self) -> int | None:
        """Return the bytes that the device itself says are taken."""
        if self.device.type != "cuda":
            return None
        free, total = torch.cuda.mem_get_info()
        return total - free

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()


def held_bytes(cache: Any) -> int:
    """Return the bytes of every tensor that one of transformers' caches holds."""
    total = 0
    for layer in cache.layers:
        parts = [layer.keys, layer.values]
        for coded, meta in (
            getattr(layer, name)
            for name in ("_quantized_keys", "_quantized_values")
            if hasattr(layer, name)
        ):
            parts += [coded, *(part for part in meta.values() if isinstance(part, Tensor))]
        total += sum(part.nbytes for part in parts)
    return total
