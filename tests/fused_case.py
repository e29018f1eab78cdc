"""Runs of one model through the fused read path and through torch, to compare; for any device."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from kvqtool.attach import Session, attach
from kvqtool.bundle import Bundle
from kvqtool.cache import KvqCache
from kvqtool.forward import next_logits
from kvqtool.models import LoadedModel
from kvqtool.read_path import ReadPath


@dataclass(frozen=True)
class Run:
    """A cache after a prompt and some tokens, and the logits (batch, tokens, vocabulary) that each
    was, or could have been, the likeliest of.
    """

    cache: KvqCache
    tokens: Tensor
    logits: Tensor

    @property
    def calls(self) -> dict[str, int]:
        """How often the first layer was read which way."""
        calls: dict[str, int] = self.cache.layers[0].path.calls  # type: ignore[union-attr]  # ours
        return calls

    @property
    def canonical(self) -> dict[str, Tensor]:
        """What a saved cache would hold of every layer."""
        return {f"{s.layer}.{n}": t for s in self.cache.stores for n, t in s.canonical().items()}


def as_on_cuda(session: Session, bundle: Bundle) -> KvqCache:
    """Return an empty cache of a session for `fused` that is read as by `auto` on a GPU: layers
    that kernels cannot read are left to torch, not refused.
    """
    paths = {
        layer.index: ReadPath(layer.index, "auto", session.unfused(layer, bundle))
        for layer in session.seam.packed
    }
    return KvqCache(session.seam, bundle, session.model.config, "exact", paths)


@torch.no_grad()
def greedy(
    loaded: LoadedModel,
    bundle: Bundle,
    ids: Tensor,
    read_path: str,
    new_tokens: int,
    forced: Tensor | None = None,
    new_cache: Callable[[Session, Bundle], KvqCache] = Session.new_cache,
) -> Run:
    """Read a prompt, (batch, tokens), and generate; or go on with `forced`, (batch, new_tokens), so
    that two runs stay comparable where two tokens are nearly as likely.
    """
    attached = attach(loaded.model, bundle, seam=loaded.seam, read_path=read_path)
    with attached as session:
        cache = new_cache(session, bundle)
        tokens, logits = [ids.to(loaded.device)], []
        for step in range(new_tokens):
            logits.append(next_logits(loaded.model, tokens[-1], cache))
            likeliest = logits[-1].argmax(-1)[:, None]
            tokens.append(likeliest if forced is None else forced[:, step : step + 1].to(likeliest))
    return Run(cache, torch.cat(tokens[1:], 1).cpu(), torch.stack(logits, 1).cpu())


def same_choices(found: Run, expected: Run, first: float = 1e-2, rms: float = 0.2) -> int:
    """Raise unless two runs agree; return how many choices differ, between tokens nearly as likely.

    Logits differ by the rounding of angles and tables to fp16: less than `first`, each of them, as
    long as all new tokens of a sequence have the same codes in both. Now and then a code falls the
    other side of a middle for it, as it would for any other rounding, and what follows differs
    more: `rms` at most, over all. In half precision that may be so from the first token on; then
    all sequences come as near as `first` again somewhere.
    """
    apart = found.logits - expected.logits
    furthest = apart[:, 1:].abs().amax(2)
    same = have_same_codes(found, expected)
    near = furthest[same] if same.any() else furthest.amax(0).min()
    assert (near < first).all()
    assert apart.square().mean().sqrt() < rms
    return int((found.logits.argmax(-1) != expected.logits.argmax(-1)).sum())


def have_same_codes(found: Run, expected: Run) -> Tensor:
    """Return for each logit but the first, (batch, tokens - 1) bool, whether the codes of all new
    tokens before it are the same in two runs.
    """
    batch, steps = found.logits.shape[0], found.logits.shape[1] - 1
    same = torch.ones(steps, batch, dtype=torch.bool)
    theirs = expected.canonical
    for name, words in found.canonical.items():
        if name.endswith(".words"):  # a row a token of a sequence, the newest last
            rows = (words == theirs[name]).all(1)[-steps * batch :]
            same &= rows.view(steps, batch).cpu()
    return same.cumprod(0).bool().T


def text_ids(loaded: LoadedModel, batch: int, tokens: int) -> Tensor:
    """Return pieces of the built-in evaluation text, (batch, tokens)."""
    from kvqtool.data import load_text

    text = load_text(None, part="evaluation").text[: 40 * batch * tokens]
    ids = torch.tensor(loaded.tokenizer(text, verbose=False)["input_ids"])
    return ids[: batch * tokens].view(batch, tokens)


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Raise unless the same tensors stand under the same names."""
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype, name
        assert torch.equal(found[name].cpu(), tensor.cpu()), name
