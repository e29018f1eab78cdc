"""Every family with heads of 64 channels, the least the kernels know: what reads each layer where
there is a GPU, and whether that gives what torch gives.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any, Final

import torch
from families import FAMILIES, build_from, divergence, learned, loaded_model, rope, tokens
from fused_case import Run, as_on_cuda, greedy

from kvqtool.bundle import Bundle
from kvqtool.calibrate import calibrate
from kvqtool.errors import InputError
from kvqtool.models import LoadedModel
from kvqtool.spec import parse_spec
from kvqtool.usage import layer_report

SPEC: Final = "nuq4-1%-sink1"
BATCH: Final = 2
PROMPT: Final = 150  # a whole page and a part of one; sliding windows of 8 and 16 lie in the latter
NEW: Final = 6
_HEAD: Final = 64
# What a family's own options need beside a head of 64 channels.
_OWN: Final[dict[str, dict[str, Any]]] = {
    "phi3 (longrope)": rope(
        "longrope",
        short_factor=[1.0] * (_HEAD // 2),
        long_factor=[4.0] * (_HEAD // 2),
        original_max_position_embeddings=64,
    ),
    "gptj": {"n_embd": 4 * _HEAD, "rotary_dim": _HEAD // 2},
    "opt": {"word_embed_proj_dim": 4 * _HEAD},
    "gpt2": {"n_embd": 4 * _HEAD},
}


@dataclass(frozen=True)
class Reading:
    """How the layers of a family are read, and what came of it; None where it was refused.

    Args:
        rows: the report's row of every layer.
        same_tokens: whether every choice is that of the torch path after the same tokens.
        kld: mean divergence of next-token distributions from the torch path's, nats.
        kld_exact: likewise from those without a cache.
    """

    rows: tuple[dict[str, Any], ...]
    same_tokens: bool
    kld: float
    kld_exact: float

    @property
    def paths(self) -> list[str]:
        """A short line per cache layer: `fused`, or what reads it and why."""
        return [path_of(row) for row in self.rows]

    @property
    def is_fused(self) -> bool:
        """Whether any layer is read by kernels."""
        return "fused" in self.paths


def path_of(row: dict[str, Any]) -> str:
    """Return what reads a layer by its row of the report."""
    if row["read_path"] == "fused":
        return "fused"
    return "stock" if row["read_path"] == "stock" else f"torch: {row['read_reason']}"


def wide(family: str) -> LoadedModel:
    """Return a family's tiny random model with heads of 64 channels."""
    config_class, options = FAMILIES[family]
    size = {"head_dim": _HEAD} if "head_dim" in options else {"hidden_size": 4 * _HEAD}
    return loaded_model(family, build_from(config_class, options | size | _OWN.get(family, {})))


def bundle_of(loaded: LoadedModel) -> Bundle:
    """Return a bundle of `SPEC`, calibrated on random tokens."""
    return calibrate(loaded, learned(), [parse_spec(SPEC)])[0]


@cache
def expected(family: str) -> tuple[Bundle, Run] | None:
    """Return a family's bundle and its run through torch on the CPU in float32; None where the
    model is refused.
    """
    loaded = wide(family)
    try:
        bundle = bundle_of(loaded)
    except InputError:
        return None
    return bundle, greedy(loaded, bundle, tokens(BATCH, PROMPT), "materialise", NEW)


@cache
def read(family: str) -> Reading | None:
    """Decode through the kernels' torch references as `auto` would on a GPU, through torch and
    without a cache, and compare; None where the model is refused.
    """
    if (known := expected(family)) is None:
        return None
    loaded, (bundle, torch_run) = wide(family), known
    ids = tokens(BATCH, PROMPT)
    found = greedy(loaded, bundle, ids, "fused", NEW, torch_run.tokens, as_on_cuda)
    whole = torch.cat([ids, torch_run.tokens[:, :-1]], 1)
    with torch.no_grad():
        exact = loaded.model(whole, use_cache=False).logits[:, -NEW:].float()
    return Reading(
        tuple(layer_report(found.cache)),
        torch.equal(found.logits.argmax(-1), torch_run.tokens),
        divergence(torch_run.logits, found.logits),
        divergence(exact, found.logits),
    )
