"""What each of several processes runs in test_context_parallel.py: argv is a folder that holds a
bundle; what it finds is written there as `{rank}.pt`.
"""

import os
import sys
from pathlib import Path
from typing import Any

import torch
from fused_case import greedy, text_ids

from kvqtool.attach import Session, attach
from kvqtool.bundle import Bundle, load_bundle
from kvqtool.context_parallel import ContextParallelCache
from kvqtool.forward import next_logits
from kvqtool.models import LoadedModel, load_model
from kvqtool.ranks import Ranks, join_ranks, leave_ranks, read_ranks

PROMPT, NEW_TOKENS, BATCH = 380, 10, 2  # a sink, two pages, and 123 tokens that become a third


def in_calls(loaded: LoadedModel, bundle: Bundle, ranks: Ranks | None) -> torch.Tensor:
    """Return the logits behind a prompt that is read in several calls, and behind a call of three
    tokens more; alone where `ranks` is None.
    """
    ids = text_ids(loaded, 1, PROMPT + 3)
    attached = attach(loaded.model, bundle, seam=loaded.seam, read_path="fused")
    with torch.no_grad(), attached as session:
        own = session.new_cache(bundle)
        cache = own if ranks is None else ContextParallelCache(own, ranks)
        # What `calls` gives two processes, whose first share ends behind 129 tokens.
        parts: Any = ids[:, :PROMPT].split([100, 29, 100, 100, PROMPT - 329], dim=1)
        if isinstance(cache, ContextParallelCache):
            parts = cache.calls(ids[:, :PROMPT], 100)
        logits = [next_logits(loaded.model, part, cache) for part in (*parts, ids[:, PROMPT:])]
    return torch.stack(logits)


def decoded(loaded: LoadedModel, bundle: Bundle, ranks: Ranks | None) -> dict[str, Any]:
    """Read a prompt in one call and decode greedily; alone where `ranks` is None."""
    caches = []

    def new_cache(session: Session, bundle: Bundle) -> Any:
        cache = session.new_cache(bundle)
        caches.append(cache)
        return cache if ranks is None else ContextParallelCache(cache, ranks)

    ids = text_ids(loaded, BATCH, PROMPT)
    run = greedy(loaded, bundle, ids, "fused", NEW_TOKENS, new_cache=new_cache)
    rows = {f"{s.layer}.{name}": t for s in caches[0].stores for name, t in s.canonical().items()}
    return {
        "tokens": run.tokens,
        "logits": run.logits,
        "codes": {name: tensor for name, tensor in rows.items() if name.endswith(".words")},
        "in_calls": in_calls(loaded, bundle, ranks),
        "length": run.cache.get_seq_length(),
        "packed": [store.bodies[0].tokens for store in caches[0].stores],
    }


if __name__ == "__main__":
    torch.set_num_threads(1)
    folder, ranks = Path(sys.argv[1]), read_ranks()
    model = load_model("builtin", device="cpu")
    join_ranks(ranks, on_gpu=False)
    found = decoded(model, load_bundle(folder / "bundle.safetensors"), ranks)
    torch.save(found, folder / f"{ranks.rank}.pt")
    leave_ranks(ranks)
    os._exit(0)  # threads of torch may not have ended, for which C++ would abort
