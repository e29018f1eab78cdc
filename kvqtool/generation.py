"""Generate text with a compressed cache, from a prompt or on from a saved cache.

Library users get the same tokens from transformers: `model.generate(**inputs,
past_key_values=session.new_cache(...))`.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import torch
from torch import Tensor

from kvqtool.attach import attached
from kvqtool.bundle import Bundle
from kvqtool.cache import KvqCache
from kvqtool.cachefile import SavedCache, load_cache, restore_cache
from kvqtool.decode import Decoder, why_eager
from kvqtool.errors import InputError
from kvqtool.forward import read_prompt
from kvqtool.live import forget_peak, peak_bytes
from kvqtool.models import LoadedModel
from kvqtool.sampling import Sampling
from kvqtool.usage import kernel_of, layer_report, measure

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Running:
    """How a model is run.

    Args:
        prefill: `exact` (the prompt attends to exact states, then they are packed) or
            `decode-exact`.
        decode: `auto`, `graph` or `eager`; see `decode.Decoder`.
        prefill_chunk: tokens of the prompt that one call reads; None for all, see
            `forward.Reading`.
    """

    prefill: str = "exact"
    decode: str = "auto"
    prefill_chunk: int | None = None


DEFAULT: Final = Running()


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
    first_token_seconds: float
    peak_bytes: int | None
    cache_bytes: int
    cache_bytes_fp16: int
    effective_bits: float
    prefill: str
    prefill_chunk: int | None
    device: str
    dtype: str
    kernel: str
    decode: dict[str, Any]
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
    running: Running = DEFAULT,
    on_text: Callable[[str], None] = ignore,
) -> GenerationResult:
    """Continue a prompt.

    Args:
        loaded: the model.
        bundle: scheme and codebooks of the cache.
        prompt: text to continue.
        sampling: how tokens are chosen.
        running: how the model is run.
        on_text: given each piece of text as soon as it is whole.

    Raises:
        InputError: when the prompt is empty or too long for the model, or `decode` cannot be.
        BundleError: when the bundle belongs to another model.
    """
    bundle.check_model(loaded.identity.as_json())
    ids: list[int] = loaded.tokenizer(prompt)["input_ids"]
    if not ids:
        raise InputError("the prompt has no tokens; give some text")
    _check_room(loaded, len(ids), sampling)
    with attached(loaded, bundle) as session:
        cache = session.new_cache(bundle, prefill=running.prefill)
        run = _Run(loaded, cache, sampling, running)
        return run.result(run.read(ids), len(ids), on_text)


@torch.no_grad()
def resume(
    loaded: LoadedModel,
    path: str | Path,
    prompt: str,
    sampling: Sampling,
    *,
    running: Running = DEFAULT,
    on_text: Callable[[str], None] = ignore,
) -> GenerationResult:
    """Go on from a saved cache without reading its document again.

    Args:
        loaded: the model the cache was made with.
        path: what `quantize-cache` wrote.
        prompt: text to put after the document; empty to continue the document itself.
        sampling: how tokens are chosen.
        running: how the model is run; the prefill is that of the saved cache.
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
        run = _Run(loaded, cache, sampling, running)
        if ids:
            logits = run.read(ids)
        else:
            assert saved.next_logits is not None
            logits = saved.next_logits[None].to(loaded.device)
        return run.result(logits, saved.tokens + len(ids), on_text)


class _Run:
    """One generation: tokens, text and figures."""

    def __init__(
        self, loaded: LoadedModel, cache: KvqCache, sampling: Sampling, running: Running
    ) -> None:
        why_eager(loaded.model, cache, running.decode)  # before a long prompt is read
        self.loaded = loaded
        self.cache = cache
        self.sampling = sampling
        self.running = running
        self.started = time.perf_counter()
        forget_peak(loaded.device)

    def read(self, ids: list[int]) -> Tensor:
        """Read a prompt; return the logits of what comes next, (1, vocabulary)."""
        prompt = torch.tensor([ids], device=self.loaded.device)
        chunk = self.cache.tokens_at_once(self.running.prefill_chunk)
        return read_prompt(self.loaded.model, prompt, self.cache, chunk)

    def result(
        self, logits: Tensor, prompt_tokens: int, on_text: Callable[[str], None]
    ) -> GenerationResult:
        """Generate on from the logits of the next token, (1, vocabulary)."""
        decoder = Decoder(self.loaded.model, self.cache, self.sampling, self.running.decode)
        text = _TextStream(self.loaded.tokenizer, on_text)
        ids: list[int] = []
        finish, began, first = "length", time.perf_counter(), 0.0
        with closing(decoder.tokens(logits)) as tokens:
            for (token,) in tokens:
                first = first or time.perf_counter() - self.started
                ids.append(token)
                if token in self._ends():
                    finish = "eos"
                    break
                text.push(token)
        text.close()
        seconds = time.perf_counter() - began
        usage = asdict(measure(self.cache))
        return GenerationResult(
            spec=self.cache.bundle.spec.name,
            text=text.sent,
            token_ids=ids,
            prompt_tokens=prompt_tokens,
            new_tokens=len(ids),
            finish=finish,
            tokens_per_second=len(ids) / seconds,
            seconds=seconds,
            first_token_seconds=first,
            peak_bytes=peak_bytes(self.loaded.device),
            **{name: usage[name] for name in ("cache_bytes", "cache_bytes_fp16", "effective_bits")},
            prefill=self.cache.prefill,
            prefill_chunk=self.running.prefill_chunk,
            device=self.loaded.device.type,
            dtype=str(self.loaded.dtype).removeprefix("torch."),
            kernel=kernel_of(self.cache),
            decode=decoder.report.as_json(),
            layers=layer_report(self.cache),
        )

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
