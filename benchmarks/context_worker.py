"""What each process of check_two_gpus.py runs: one sequence of the built-in model that processes
share, against the same one that each holds whole.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from split_worker import far
from torch import Tensor, distributed

from kvqtool.attach import attach
from kvqtool.bundle import Bundle, load_bundle, save_bundle
from kvqtool.cache import KvqCache
from kvqtool.calibrate import calibrate
from kvqtool.context_parallel import ContextParallelCache
from kvqtool.data import calibration_windows, load_text
from kvqtool.forward import next_logits
from kvqtool.models import LoadedModel, load_model
from kvqtool.ranks import Ranks, join_ranks, leave_ranks, read_ranks
from kvqtool.spec import parse_spec
from kvqtool.usage import kernel_of

SPEC = "nuq3-1%-sink1"
# A sink, pages, and tokens that become a page while steps are taken.
PROMPT, STEPS = 1 + 7 * 128 + 118, 20
CALL = 200  # tokens of a call, where the prompt is read in several


def main() -> None:
    """Compare, and write what the first process finds."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("report", type=Path)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    ranks = read_ranks()
    join_ranks(ranks, on_gpu=options.device == "cuda")
    place = f"cuda:{ranks.local_rank}" if options.device == "cuda" else "cpu"
    loaded = load_model("builtin", device=place, dtype=options.dtype)
    bundle = shared_bundle(loaded, ranks, options.report.with_suffix(".safetensors"))
    text = load_text(None, part="evaluation").text[:20_000]
    ids = loaded.tokenizer(text, return_tensors="pt")["input_ids"][:, : PROMPT + STEPS].to(place)
    with torch.no_grad():
        exact = loaded.model(ids).logits[:, PROMPT - 1 :].float()
    report: dict[str, Any] = {"errors": {}}
    for name, call in (("one call", PROMPT), (f"calls of {CALL}", CALL)):
        alone, whole = run(loaded, bundle, ids, call, ranks, is_shared=False)
        shared, share = run(loaded, bundle, ids, call, ranks, is_shared=True)
        errors = {"apart": far(shared, alone), "alone": far(alone, exact)}
        report["errors"][name] = errors | {"shared": far(shared, exact)}
        everywhere = ranks.gather(shared)
        report["same_bits"] = bool((everywhere == shared).all()) and report.get("same_bits", True)
        if call == PROMPT:
            report |= compare_codes(whole, share, ranks, place)
            report |= {"kernel": kernel_of(share), "alone": kernel_of(whole)}
    if ranks.is_first:
        options.report.write_text(json.dumps(report), encoding="utf-8")
    leave_ranks(ranks)


def shared_bundle(loaded: LoadedModel, ranks: Ranks, path: Path) -> Bundle:
    """Return what the first process calibrates."""
    if ranks.is_first:
        learn = load_text(None, part="calibration")
        windows = calibration_windows(learn, loaded.tokenizer, samples=4, seq_len=256, seed=0)
        save_bundle(calibrate(loaded, windows, [parse_spec(SPEC)])[0], path)
    if not ranks.is_alone:
        distributed.barrier()
    return load_bundle(path)


@torch.no_grad()
def run(
    loaded: LoadedModel, bundle: Bundle, ids: Tensor, call: int, ranks: Ranks, *, is_shared: bool
) -> tuple[Tensor, KvqCache]:
    """Read a prompt in calls of so many tokens, and then token by token; return float32 logits (1,
    STEPS + 1, vocabulary) and this process's own cache, all of the sequence or a share.
    """
    with attach(loaded.model, bundle, seam=loaded.seam, read_path="fused") as session:
        own = session.new_cache(bundle)
        shared = ContextParallelCache(own, ranks)
        cache: Any = shared if is_shared else own
        prompt, fed = ids[:, :PROMPT], ids[:, PROMPT:]
        # Calls of a shared prompt end where shares do, and later ones attend to codes.
        parts = shared.calls(prompt, call) if call < PROMPT else [prompt]
        logits = [next_logits(loaded.model, part, cache) for part in parts][-1:]
        logits += [next_logits(loaded.model, token, cache) for token in fed.split(1, dim=1)]
    return torch.stack(logits, dim=1), own


def compare_codes(whole: KvqCache, share: KvqCache, ranks: Ranks, place: str) -> dict[str, Any]:
    """Return how many tokens each process has packed, and whether codes of the prompt's are those
    of the whole sequence.
    """
    held = torch.tensor([share.stores[0].bodies[0].tokens], device=place)
    counts = [int(count) for count in ranks.gather(held).flatten()]
    first = sum(counts[: ranks.rank])
    stop = min(first + counts[ranks.rank], PROMPT - 1)
    is_same = True
    for one, other in zip(whole.stores, share.stores, strict=True):
        rows, ours = one.canonical(), other.canonical()
        for name in ("key.words", "value.words"):
            is_same &= torch.equal(ours[name][: stop - first], rows[name][first:stop])
    all_same = ranks.reduce(torch.tensor([int(is_same)], device=place), "MIN")
    return {"packed": counts, "same_codes": bool(all_same)}


if __name__ == "__main__":
    main()
