"""What each of several processes runs in test_context_parallel.py: argv is a folder that holds a
bundle; what it finds is written there as `{rank}.pt`.
"""

import sys
from pathlib import Path
from typing import Any

import torch
from fused_case import greedy, text_ids

from kvqtool.attach import Session
from kvqtool.bundle import Bundle, load_bundle
from kvqtool.context_parallel import ContextParallelCache
from kvqtool.models import LoadedModel, load_model
from kvqtool.ranks import Ranks, join_ranks, leave_ranks, read_ranks

PROMPT, NEW_TOKENS, BATCH = 380, 10, 2  # a sink, two pages, and 123 tokens that become a third


def decoded(loaded: LoadedModel, bundle: Bundle, ranks: Ranks | None) -> dict[str, Any]:
    """Read a prompt and decode greedily; alone where `ranks` is None."""
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
