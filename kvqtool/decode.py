"""Generate token after token: forwards through a cache, from a CUDA graph where that can hold them.

A graph saves the host's work for each of a model's hundreds of launches, and what it chose is read
one step behind, so that the GPU never waits.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import closing
from dataclasses import asdict, dataclass
from functools import cache
from inspect import signature
from typing import TYPE_CHECKING, Any, Final

import torch
from torch import Tensor

from kvqtool.cache import KvqCache
from kvqtool.errors import InputError, RunError
from kvqtool.forward import layers_of, next_logits
from kvqtool.sampling import BROKEN, Sampling, choose_tokens
from kvqtool.steady import SteadyCache, unsteady

if TYPE_CHECKING:
    from transformers import PreTrainedModel

DECODE_MODES: Final = ("auto", "graph", "eager")
_SLOTS: Final = 2  # tokens on their way to the host


@dataclass
class DecodeReport:
    """How tokens were generated.

    Args:
        reason: why not from a graph, or None.
        replayed: steps that were replayed from a graph.
        captured: graphs that were captured.
    """

    reason: str | None
    replayed: int = 0
    captured: int = 0

    @property
    def mode(self) -> str:
        """`graph` or `eager`."""
        return "eager" if self.reason else "graph"

    def as_json(self) -> dict[str, Any]:
        """Return every field, and the mode."""
        return {"mode": self.mode, **asdict(self)}


class Decoder:
    """Generates from a model whose prompt is in a cache."""

    def __init__(
        self, model: PreTrainedModel, cache: KvqCache, sampling: Sampling, mode: str = "auto"
    ) -> None:
        """Choose how.

        Args:
            model: the model, attached.
            cache: holds the prompt.
            sampling: how tokens are chosen.
            mode: `graph` refuses where a graph cannot hold a step; `auto` decodes eagerly there.

        Raises:
            InputError: when the mode is unknown, or `graph` was asked for and cannot be.
        """
        self._model = model
        self._cache = cache
        self._sampling = sampling
        self._must_capture = mode == "graph"
        self.report = DecodeReport(why_eager(model, cache, mode))

    def tokens(self, logits: Tensor) -> Generator[list[int]]:
        """Yield each sequence's next token, (batch,), until `max_new_tokens`; stop any time.

        Args:
            logits: (batch, vocabulary) float32, of the first token.

        Raises:
            RunError: when logits hold NaN or infinity, or a graph was asked for and capturing one
                failed.
        """
        draws = self._sampling.draws(len(logits), logits.device)
        first = choose_tokens(logits, self._sampling, draws[0])
        decode = self._eagerly if self.report.reason else self._by_graph
        with closing(decode(first, draws)) as chosen:
            for tokens in chosen:
                if self._must_capture and self.report.reason:
                    raise RunError(f"{self.report.reason}; use --decode auto or eager")
                if BROKEN in tokens:
                    raise RunError(
                        "logits hold NaN or infinity; run in float32 or check the model's weights"
                    )
                yield tokens

    def _eagerly(self, first: Tensor, draws: Tensor) -> Generator[list[int]]:
        tokens = first
        for number in range(len(draws)):
            yield tokens.tolist()
            if number + 1 < len(draws):
                logits = next_logits(self._model, tokens[:, None], self._cache)
                drawn = draws[number + 1].to(logits.device)  # of a spread model, not the first's
                tokens = choose_tokens(logits, self._sampling, drawn)

    def _by_graph(self, first: Tensor, draws: Tensor) -> Generator[list[int]]:
        """One step is always under way while the token before it is read."""
        steps = _Steps(self._model, self._cache, self._sampling, (first, draws), self.report)
        under_way, surplus = steps.send(), 0
        try:
            for _ in range(1, len(draws)):
                steps.step()
                before, under_way = under_way, steps.send()
                surplus = 1  # fed already, and not wanted by who stops here
                yield before()
                surplus = 0
        finally:
            steps.close(surplus)
        yield under_way()


def why_eager(model: PreTrainedModel, cache: KvqCache, mode: str) -> str | None:
    """Return why a generation is not decoded from a graph, or None where it is.

    Args:
        model: the model.
        cache: its cache; one that is still empty tells less.
        mode: one of DECODE_MODES.

    Raises:
        InputError: when the mode is unknown, or `graph` was asked for and cannot be.
    """
    if mode not in DECODE_MODES:
        raise InputError(f"decode {mode!r} is unknown; use one of: {', '.join(DECODE_MODES)}")
    reason = "asked for" if mode == "eager" else ungraphed(model, cache)
    if reason and mode == "graph":
        raise InputError(f"no graph can hold a step: {reason}; use --decode auto or eager")
    return reason


def ungraphed(model: PreTrainedModel, cache: KvqCache) -> str | None:
    """Return why a CUDA graph cannot hold a decode step, in one sentence, or None where it can."""
    if not all(part.is_cuda for part in model.parameters()):
        return "the model is not on one CUDA device"
    if len({part.device for part in model.parameters()}) > 1:
        return "the model is spread over several devices"
    if "position_ids" not in signature(layers_of(model).forward).parameters:
        return "the model takes no positions"
    return unsteady(cache)


class _Steps:
    """Decode steps of one generation, on the device: nothing here waits for it."""

    def __init__(
        self,
        model: PreTrainedModel,
        cache: KvqCache,
        sampling: Sampling,
        chosen: tuple[Tensor, Tensor],
        report: DecodeReport,
    ) -> None:
        first, draws = chosen
        self._model = model
        self._cache = cache
        self._steady = SteadyCache(cache)
        self._sampling = sampling
        self._draws = draws
        self._report = report
        self._tokens = first.clone()
        self._number = torch.ones(1, dtype=torch.int64, device=first.device)
        start = cache.get_seq_length()
        self._positions = torch.full((len(first), 1), start, device=first.device)
        self._slots = torch.empty(_SLOTS, len(first), dtype=torch.int64, pin_memory=True)
        self._pool = torch.cuda.graph_pool_handle()
        self._graph: torch.cuda.CUDAGraph | None = None
        self._stale: torch.cuda.CUDAGraph | None = None  # keeps the pool until there is another
        self._addresses: tuple[int, ...] = ()
        self._left = self._done = self._sent = 0
        self._is_warm = False

    def send(self) -> Callable[[], list[int]]:
        """Send the tokens chosen last to the host; return what waits for them there."""
        slot = self._slots[self._sent % _SLOTS]
        self._sent += 1
        slot.copy_(self._tokens, non_blocking=True)
        # The current stream is that of the current device, which the model's need not be.
        event = torch.cuda.current_stream(self._tokens.device).record_event()

        def read() -> list[int]:
            event.synchronize()
            return [int(token) for token in slot.tolist()]

        return read

    def step(self) -> None:
        """Feed the tokens chosen last, and choose the next."""
        if not self._left:
            self._begin()
        if not self._left:  # this step needs the cache itself
            self._forward(self._cache)
            return
        if not self._is_warm:
            self._warm()
        elif self._graph is not None or self._capture():
            assert self._graph is not None
            self._graph.replay()
            self._report.replayed += 1
        else:
            self._forward(self._steady)
        self._left -= 1
        self._done += 1

    def close(self, surplus: int) -> None:
        """Leave the cache with all tokens fed, but for the last `surplus` of them."""
        self._settle()
        self._graph = self._stale = None
        if surplus:
            self._cache.crop(-surplus)

    def _settle(self) -> None:
        self._steady.settle(self._done)
        self._done = 0

    def _begin(self) -> None:
        """Go on to the next page; a graph stays as long as all it knows lies where it lay."""
        self._settle()
        self._left = self._steady.begin()
        if self._left and self._steady.addresses != self._addresses:
            self._stale, self._graph = self._graph or self._stale, None
            self._addresses = self._steady.addresses

    def _forward(self, cache: Any) -> None:
        """Run one step; a graph holds this."""
        ids = self._tokens.clamp(min=0)[:, None]
        logits = next_logits(self._model, ids, cache, self._positions)
        draws = self._draws.index_select(0, self._number)[0]
        self._tokens.copy_(choose_tokens(logits, self._sampling, draws))
        self._positions += 1
        self._number += 1
        if cache is self._steady:
            self._steady.advance()

    def _warm(self) -> None:
        """Run a step as capturing will: what allocates or compiles once does so here."""
        device = self._tokens.device
        stream, own = _side_stream(device), torch.cuda.current_stream(device)
        stream.wait_stream(own)
        with torch.cuda.stream(stream):
            self._forward(self._steady)
        own.wait_stream(stream)
        self._is_warm = True

    def _capture(self) -> bool:
        """Capture a step; return whether that could be."""
        if self._report.reason:
            return False
        graph = torch.cuda.CUDAGraph()
        try:
            device = self._tokens.device
            with (
                torch.cuda.device(device),
                torch.cuda.graph(graph, self._pool, _side_stream(device)),
            ):
                self._forward(self._steady)
        except RuntimeError as error:
            self._steady.forget()
            self._report.reason = f"capturing a step failed: {_first_cause(error)}"
            return False
        self._graph, self._stale = graph, None
        self._report.captured += 1
        return True


@cache
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    """Return the stream that a device's steps are warmed up and captured on: cuBLAS keeps tens of
    MiB for every stream that it ever worked on.
    """
    return torch.cuda.Stream(device)


def _first_cause(error: BaseException) -> str:
    """Return the first line of the error that came first: what ends a capture hides it."""
    while error.__context__ is not None:
        error = error.__context__
    return str(error).partition("\n")[0]
