"""Hold the fused read path against the torch path, on a GPU: tokens, codes, perplexity, speed.

    python benchmarks/check_fused.py data/smollm2 kvq3.safetensors --output check-fused.json

`tokens`: greedy tokens through `fused`, `materialise` and on the CPU, with the first place where
they part and how near its two likeliest tokens were. `codes`: one set of states into caches on CPU
and GPU, by both paths; what would be saved is compared bit for bit. `ppl`: the first tokens decoded
behind many prompts, through both paths. `speed`: tokens a second at one context. One JSON object;
exit code 1 where codes differ.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
from bench_quality import commit, machine
from torch import Tensor
from transformers import DynamicCache

from kvqtool.attach import attached
from kvqtool.bundle import Bundle, load_bundle
from kvqtool.cache import KvqCache
from kvqtool.data import load_text
from kvqtool.forward import next_logits
from kvqtool.models import LoadedModel, load_model
from kvqtool.usage import kernel_of, layer_report

WARM_UP = 8


def main() -> None:
    """Check and print."""
    options = _options()
    loaded = load_model(options.model, device=options.device, dtype=options.dtype)
    bundle = load_bundle(options.bundle)
    record: dict[str, Any] = {
        "command": " ".join(["python", *sys.argv]),
        "machine": machine(),
        "commit": options.commit or commit(),
        "date": time.strftime("%Y-%m-%d"),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "spec": bundle.spec.name,
        "dtype": str(loaded.dtype).removeprefix("torch."),
    }
    checks = {
        "tokens": lambda: check_tokens(loaded, bundle, options),
        "codes": lambda: check_codes(loaded, bundle, options.prompt),
        "ppl": lambda: check_ppl(loaded, bundle, options),
        "speed": lambda: check_speed(loaded, bundle, options),
    }
    for name in options.only or checks:
        print(f"{name} ...", file=sys.stderr, flush=True)
        record[name] = checks[name]()
        if options.output:
            options.output.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(record))
    if record.get("codes", {}).get("differing"):
        sys.exit(1)


@torch.no_grad()
def generate(
    loaded: LoadedModel, bundle: Bundle | None, ids: Tensor, count: int, read_path: str
) -> tuple[list[int], list[float], Any]:
    """Return greedy tokens, how far each was ahead of the second, and the cache."""
    loaded.read_path = read_path
    tokens, gaps = [], []
    with attached(loaded, bundle) as session:
        cache = _new_cache(session, loaded, bundle)
        logits = next_logits(loaded.model, ids.to(loaded.device), cache)
        for _ in range(count):
            best = logits[0].topk(2)
            tokens.append(int(best.indices[0]))
            gaps.append(float(best.values[0] - best.values[1]))
            logits = next_logits(loaded.model, best.indices[:1][None], cache)
    return tokens, gaps, cache


def check_tokens(
    loaded: LoadedModel, bundle: Bundle, options: argparse.Namespace
) -> dict[str, Any]:
    """Compare greedy tokens of the paths, and of the same dtype on the CPU."""
    ids = text_ids(loaded, options.prompt)
    runs = {path: (loaded, path) for path in ("fused", "materialise")}
    if not options.skip_cpu:
        there = load_model(
            options.model, device="cpu", dtype=str(loaded.dtype).removeprefix("torch.")
        )
        runs["cpu"] = there, "materialise"
    found = {
        name: generate(model, bundle, ids, options.tokens, path)
        for name, (model, path) in runs.items()
    }
    expected, gaps, _ = found["materialise"]
    rows: dict[str, Any] = {}
    for name, (tokens, _, cache) in found.items():
        parted = next((i for i, t in enumerate(tokens) if t != expected[i]), None)
        rows[name] = {
            "kernel": kernel_of(cache),
            "equal_tokens": len(tokens) if parted is None else parted,
            "tokens": len(tokens),
            "gap_where_parted": None if parted is None else gaps[parted],
            "cache_bytes": cache.nbytes,
            "read_reasons": sorted({str(r["read_reason"]) for r in layer_report(cache)}),
        }
    return rows


@torch.no_grad()
def check_codes(loaded: LoadedModel, bundle: Bundle, prompt: int) -> dict[str, Any]:
    """Compare what the same states are stored as: on CPU and GPU with the same angles, and by both
    paths on the GPU with its own.
    """
    cpu, gpu = torch.device("cpu"), loaded.device
    pairs = {
        "gpu against cpu": ((cpu, "materialise", cpu), (gpu, "materialise", cpu)),
        "fused against materialise": ((gpu, "materialise", gpu), (gpu, "fused", gpu)),
    }
    differing, tensors = {}, 0
    for name, (left, right) in pairs.items():
        expected, found = (canonical(fill(loaded, bundle, prompt, at)) for at in (left, right))
        assert found.keys() == expected.keys()
        wrong = [n for n, t in expected.items() if not torch.equal(found[n].cpu(), t.cpu())]
        tensors += len(expected)
        if wrong:
            differing[name] = wrong
    return {"tensors": tensors, "differing": differing}


def fill(
    loaded: LoadedModel, bundle: Bundle, prompt: int, at: tuple[torch.device, str, torch.device]
) -> KvqCache:
    """Put random states, the same each time, into a cache: a prompt, then 140 single tokens.

    Args:
        loaded: the model.
        bundle: scheme and codebooks.
        prompt: tokens of the prompt.
        at: the cache's device, its read path, and the device that angles are computed on.
    """
    device, loaded.read_path, angles = at
    random, start = torch.Generator().manual_seed(0), 0
    with attached(loaded, bundle) as session:
        cache = session.new_cache(bundle)
        for tokens in (prompt, *[1] * 140):
            positions = torch.arange(start, start + tokens)[None]
            start += tokens
            for layer in loaded.seam.packed:
                shape = (1, layer.geometry.num_kv_heads, tokens, layer.geometry.key_dim)
                key, value = (torch.randn(shape, generator=random) for _ in range(2))
                states = [(part * 2).to(device, loaded.dtype) for part in (key, value)]
                if layer.rotation is not None and layer.formula is not None:
                    tables = layer.rotation.model_tables(
                        *layer.formula.tables(positions.to(angles))
                    )
                    cos, sin = (table.to(device) for table in tables)
                    cache.announce(layer.index, cos, sin, positions.to(device))
                keys, _ = cache.update(*states, layer.index)
                # Nothing attends here: stand in for attention's word that it got these keys.
                witness = getattr(keys, "_kvqtool_witness", None)
                if witness is not None:
                    witness(None)
    return cache


def canonical(cache: KvqCache) -> dict[str, Tensor]:
    """Return what would be saved of every layer."""
    return {f"{s.layer}.{n}": t for s in cache.stores for n, t in s.canonical().items()}


@torch.no_grad()
def check_ppl(loaded: LoadedModel, bundle: Bundle, options: argparse.Namespace) -> dict[str, Any]:
    """Compare the perplexity of tokens that are decoded one by one, a few behind each of many
    prompts, `batch` of these at a time. The prompts' codes are the same bits on both paths. Over
    long decodes paths part by chance: where a rounding moves one code, everything behind differs.
    """
    text = load_text(options.dataset, part="evaluation").text
    ids = torch.tensor(loaded.tokenizer(text, verbose=False)["input_ids"])
    length, batch, few = options.seq_len, options.batch, options.behind
    groups = min(options.windows, len(ids) // (length * batch))
    if groups < 1 or few < 2:
        sys.exit(f"{len(ids)} tokens are less than a batch of {batch} x {length}, or --behind < 2")
    windows = ids[: groups * batch * length].view(-1, length)
    losses: dict[str, list[Tensor]] = {"fused": [], "materialise": []}
    figures: dict[str, Any] = {path: {} for path in losses}
    for path, found in losses.items():
        loaded.read_path = path
        started = _now(loaded)
        for group in windows.to(loaded.device).split(batch):
            with attached(loaded, bundle) as session:
                cache = _new_cache(session, loaded, bundle)
                for at in range(length - few - 1, length - 1):
                    seen = group[:, : at + 1] if at == length - few - 1 else group[:, at : at + 1]
                    logits = next_logits(loaded.model, seen, cache).float().log_softmax(-1)
                    found.append(-logits.gather(1, group[:, at + 1, None])[:, 0].cpu())
        figures[path]["kernel"] = kernel_of(cache)
        figures[path]["seconds"] = _now(loaded) - started
    # The first token of each window comes from the prompt's own, exact attention.
    per_token = {
        path: torch.stack([loss for i, loss in enumerate(found) if i % few])
        for path, found in losses.items()
    }
    for path, loss in per_token.items():
        figures[path]["ppl"] = loss.mean().exp().item()
    apart = per_token["fused"] - per_token["materialise"]
    figures |= {
        "prompts": len(windows),
        "prompt_tokens": length - few,
        "tokens": apart.numel(),
        "relative_difference": figures["fused"]["ppl"] / figures["materialise"]["ppl"] - 1,
        "standard_error": (apart.std() / apart.numel() ** 0.5).item(),
        "by_tokens_behind": [apart[at :: few - 1].mean().item() for at in range(few - 1)],
    }
    return figures


def check_speed(loaded: LoadedModel, bundle: Bundle, options: argparse.Namespace) -> dict[str, Any]:
    """Time decode steps at a context, the first few left out."""
    ids = text_ids(loaded, options.context)
    rows: dict[str, Any] = {"context_tokens": options.context}
    for path in ("fused", "materialise", "fp16 DynamicCache"):
        own = None if path.startswith("fp16") else bundle
        rows[path] = time_steps(loaded, own, ids, options.steps, "auto" if own is None else path)
    return rows


@torch.no_grad()
def time_steps(
    loaded: LoadedModel, bundle: Bundle | None, ids: Tensor, steps: int, read_path: str
) -> dict[str, Any]:
    """Return seconds of the prompt, median seconds of a step, tokens a second and bytes."""
    loaded.read_path = read_path
    with attached(loaded, bundle) as session:
        cache = _new_cache(session, loaded, bundle)
        started = _now(loaded)
        logits = next_logits(loaded.model, ids.to(loaded.device), cache)
        prompt_seconds, seconds = _now(loaded) - started, []
        for _ in range(WARM_UP + steps):
            started = _now(loaded)
            logits = next_logits(loaded.model, logits.argmax(-1)[:, None], cache)
            seconds.append(_now(loaded) - started)
    median = statistics.median(seconds[WARM_UP:])
    row = {
        "prompt_seconds": prompt_seconds,
        "step_seconds": median,
        "tokens_per_second": 1 / median,
    }
    if isinstance(cache, KvqCache):
        row |= {"kernel": kernel_of(cache), "cache_bytes": cache.nbytes}
    return row


def text_ids(loaded: LoadedModel, tokens: int) -> Tensor:
    """Return the first tokens of the evaluation text, repeated where it is short, (1, tokens)."""
    text = load_text(None, part="evaluation").text
    ids = torch.tensor(loaded.tokenizer(text, verbose=False)["input_ids"])
    return ids.repeat(-(-tokens // len(ids)))[None, :tokens]


def _new_cache(session: Any, loaded: LoadedModel, bundle: Bundle | None) -> Any:
    if bundle is None:
        return DynamicCache(config=loaded.model.config)
    return session.new_cache(bundle)


def _now(loaded: LoadedModel) -> float:
    if loaded.device.type == "cuda":
        torch.cuda.synchronize(loaded.device)
    return time.perf_counter()


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model", help="model folder or builtin")
    parser.add_argument("bundle", help="bundle file")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--tokens", type=int, default=256, help="greedy tokens")
    parser.add_argument("--prompt", type=int, default=500, help="tokens of the prompt")
    parser.add_argument("--dataset", help="text of ppl")
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--windows", type=int, default=2, help="batches of prompts of ppl")
    parser.add_argument("--batch", type=int, default=16, help="prompts at a time of ppl")
    parser.add_argument("--behind", type=int, default=5, help="tokens decoded behind each of ppl")
    parser.add_argument("--context", type=int, default=2000)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--skip-cpu", action="store_true", help="no greedy tokens on the CPU")
    parser.add_argument("--only", nargs="*", help="of: tokens codes ppl speed")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--commit")
    return parser.parse_args()


if __name__ == "__main__":
    main()
