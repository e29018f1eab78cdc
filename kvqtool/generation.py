"""Generate text with a compressed cache, from a prompt or on from a saved cache.

Library users get the same tokens from transformers: `model.generate(**inputs,
past_key_values=session.new_cache(...))`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from kvqtool.attach import attached
from kvqtool.bundle import Bundle
from kvqtool.cache import KvqCache
from kvqtool.cachefile import SavedCache, load_cache, restore_cache
from kvqtool.errors import InputError, RunError
from kvqtool.forward import next_logits
from kvqtool.models import LoadedModel
from kvqtool.usage import kernel_of, layer_report, measure

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen.

    Args:
        max_new_tokens: most tokens to generate.
        temperature: 0 takes the likeliest token; higher flattens the distribution.
        top_p: least share of probability, likeliest tokens first, that is drawn from.
        top_k: likeliest tokens that are drawn from; 0 for all.
        seed: of the generator that draws.
    """

    max_new_tokens: int = 64
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int = 0


@dataclass(frozen=True)
class GenerationResult:
    """What `kvqtool generate` reports; every field is documented in docs/json.md."""

    spec: str
    text: str
    token_ids: list[int]
    prompt_tokens: int
    new_tokens: int
    finish: str
    tokens_per_second: float
    seconds: float
    cache_bytes: int
    cache_bytes_fp16: int
    effective_bits: float
    prefill: str
    device: str
    dtype: str
    kernel: str
    layers: list[dict[str, Any]]


def ignore(text: str) -> None:
    """Take generated text nowhere: the default of `on_text`."""


@torch.no_grad()
def generate(
    loaded: LoadedModel,
    bundle: Bundle,
    prompt: str,
    sampling: Sampling,
    *,
    prefill: str = "exact",
    on_text: Callable[[str], None] = ignore,
) -> GenerationResult:
    """Continue a prompt.

    Args:
        loaded: the model.
        bundle: scheme and codebooks of the cache.
        prompt: text to continue.
        sampling: how tokens are chosen.
        prefill: `exact` (the prompt attends to exact states, then they are packed) or
            `decode-exact`.
        on_text: given each piece of text as soon as it is whole.

    Raises:
        InputError: when the prompt is empty or too long for the model.
        BundleError: when the bundle belongs to another model.
    """
    bundle.check_model(loaded.identity.as_json())
    ids: list[int] = loaded.tokenizer(prompt)["input_ids"]
    if not ids:
        raise InputError("the prompt has no tokens; give some text")
    _check_room(loaded, len(ids), sampling)
    with attached(loaded, bundle) as session:
        cache = session.new_cache(bundle, prefill=prefill)
        logits = next_logits(loaded.model, torch.tensor([ids], device=loaded.device), cache)[0]
        return _Run(loaded, cache, sampling, on_text).result(logits, len(ids))


@torch.no_grad()
def resume(
    loaded: LoadedModel,
    path: str | Path,
    prompt: str,
    sampling: Sampling,
    *,
    on_text: Callable[[str], None] = ignore,
) -> GenerationResult:
    """Go on from a saved cache without reading its document again.

    Args:
        loaded: the model the cache was made with.
        path: what `quantize-cache` wrote.
        prompt: text to put after the document; empty to continue the document itself.
        sampling: how tokens are chosen.
        on_text: given each piece of text as soon as it is whole.

    Raises:
        InputError: when there is nothing to continue from, or no room left.
        BundleError: when the file is damaged or belongs to another model.
    """
    saved: SavedCache = load_cache(path)
    saved.bundle.check_model(loaded.identity.as_json())
    ids: list[int] = (
        loaded.tokenizer(prompt, add_special_tokens=False)["input_ids"] if prompt else []
    )
    _check_room(loaded, saved.tokens + len(ids), sampling)
    if not ids and saved.next_logits is None:
        raise InputError(
            f"cache {path} was made from states and has no next token; give a prompt to go on with"
        )
    with attached(loaded, saved.bundle) as session:
        cache = restore_cache(session, saved, loaded)
        if ids:
            logits = next_logits(loaded.model, torch.tensor([ids], device=loaded.device), cache)[0]
        else:
            assert saved.next_logits is not None
            logits = saved.next_logits.to(loaded.device)
        return _Run(loaded, cache, sampling, on_text).result(logits, saved.tokens + len(ids))


def choose_token(logits: Tensor, sampling: Sampling, generator: torch.Generator) -> int:
    """Choose the next token.

    Args:
        logits: (vocabulary,) float32.
        sampling: temperature 0 takes the likeliest; else top-k, then top-p, then a draw.
        generator: of the draw, on the CPU, so that a seed means the same tokens on every device.
    """
    if sampling.temperature == 0:
        return int(logits.argmax())
    scaled = logits.float().cpu() / sampling.temperature
    if sampling.top_k:
        least = scaled.topk(min(sampling.top_k, len(scaled))).values[-1]
        scaled = scaled.masked_fill(scaled < least, float("-inf"))
    probabilities, order = scaled.softmax(-1).sort(descending=True, stable=True)
    before = probabilities.cumsum(-1) - probabilities
    probabilities = probabilities.masked_fill((before >= sampling.top_p) & (before > 0), 0.0)
    return int(order[torch.multinomial(probabilities, 1, generator=generator)])


class _Run:
    """One generation: tokens, text and figures."""

    def __init__(
        self,
        loaded: LoadedModel,
        cache: KvqCache,
        sampling: Sampling,
        on_text: Callable[[str], None],
    ) -> None:
        self.loaded = loaded
        self.cache = cache
        self.sampling = sampling
        self.text = _TextStream(loaded.tokenizer, on_text)

    def result(self, logits: Tensor, prompt_tokens: int) -> GenerationResult:
        """Generate on from the logits of the next token, (vocabulary,)."""
        started = time.perf_counter()
        ids: list[int] = []
        finish = "length"
        for token in self._tokens(logits):
            ids.append(token)
            if token in self._ends():
                finish = "eos"
                break
            self.text.push(token)
        self.text.close()
        seconds = time.perf_counter() - started
        usage = asdict(measure(self.cache))
        return GenerationResult(
            spec=self.cache.bundle.spec.name,
            text=self.text.sent,
            token_ids=ids,
            prompt_tokens=prompt_tokens,
            new_tokens=len(ids),
            finish=finish,
            tokens_per_second=len(ids) / seconds,
            seconds=seconds,
            **{name: usage[name] for name in ("cache_bytes", "cache_bytes_fp16", "effective_bits")},
            prefill=self.cache.prefill,
            device=self.loaded.device.type,
            dtype=str(self.loaded.dtype).removeprefix("torch."),
            kernel=kernel_of(self.cache),
            layers=layer_report(self.cache),
        )

    def _tokens(self, logits: Tensor) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.sampling.seed)
        for count in range(1, self.sampling.max_new_tokens + 1):
            if not torch.isfinite(logits).all():
                raise RunError(
                    "logits hold NaN or infinity; run in float32 or check the model's weights"
                )
            token = choose_token(logits, self.sampling, generator)
            yield token
            if count < self.sampling.max_new_tokens:
                logits = next_logits(
                    self.loaded.model, torch.tensor([[token]], device=logits.device), self.cache
                )[0]

    def _ends(self) -> set[int]:
        config = self.loaded.model.generation_config
        ends = config.eos_token_id if config is not None else None
        if ends is None:
            ends = self.loaded.tokenizer.eos_token_id
        return set() if ends is None else {ends} if isinstance(ends, int) else set(ends)


class _TextStream:
    """Turns tokens into text as they come, holding back characters whose bytes are not complete."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, on_text: Callable[[str], None]) -> None:
        self.sent = ""
        self._tokenizer = tokenizer
        self._on_text = on_text
        self._ids: list[int] = []

    def push(self, token: int) -> None:
        """Add a token."""
        self._ids.append(token)
        text = self._decoded()
        if not text.endswith("\ufffd"):
            self._send(text)

    def close(self) -> None:
        """Send what was held back."""
        if self._ids:
            self._send(self._decoded())

    def _decoded(self) -> str:
        return str(self._tokenizer.decode(self._ids, skip_special_tokens=True))

    def _send(self, text: str) -> None:
        fresh = text[len(self.sent) :]
        if fresh:
            self._on_text(fresh)
            self.sent = text


def _check_room(loaded: LoadedModel, tokens: int, sampling: Sampling) -> None:
    room = loaded.identity.max_context
    if tokens + sampling.max_new_tokens > room:
        raise InputError(
            f"{tokens} tokens and {sampling.max_new_tokens} new ones exceed the model's context "
            f"of {room}; "
            "shorten the text or lower --max-new-tokens"
        )
