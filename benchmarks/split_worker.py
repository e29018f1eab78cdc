"""What each process of check_two_gpus.py runs: the built-in model with a share of its heads.

Behind an exact cache it must be the whole model; behind a compressed one, kernels must give what
torch gives.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, distributed
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.distributed import DistributedConfig

from kvqtool.attach import attach
from kvqtool.bundle import Bundle, uncalibrated_bundle
from kvqtool.calibrate import calibrate
from kvqtool.data import calibration_windows, load_text
from kvqtool.models import LoadedModel, builtin_folder, identify, load_model
from kvqtool.seam import Seam
from kvqtool.spec import parse_spec
from kvqtool.usage import kernel_of

SPEC = "nuq4-1%-sink1"
PROMPT, STEPS = 300, 20


def main() -> None:
    """Compare, and write what the first process finds."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("report", type=Path)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    distributed.init_process_group("nccl" if options.device == "cuda" else "gloo")
    rank, processes = distributed.get_rank(), distributed.get_world_size()
    place = f"cuda:{rank}" if options.device == "cuda" else "cpu"
    if options.device == "cuda":
        torch.cuda.set_device(rank)
    whole = load_model("builtin", device=place, dtype=options.dtype)
    model = split(getattr(torch, options.dtype), processes)
    identity = identify(model, whole.tokenizer, name="builtin")
    ours = LoadedModel(identity, model, whole.tokenizer, whole.device, whole.dtype)
    text = load_text(None, part="evaluation").text[:20_000]
    ids = whole.tokenizer(text, return_tensors="pt")["input_ids"][:, : PROMPT + STEPS].to(place)
    packed = [layer.index for layer in ours.seam.packed]
    plain = uncalibrated_bundle(parse_spec("fp"), identity.as_json(), packed)
    with torch.no_grad():
        exact = whole.model(ids).logits[:, PROMPT - 1 :].float()
    errors = {"fp": far(run(model, ours.seam, plain, ids, "materialise")[0], exact)}
    learned = calibration_windows(
        load_text(None, part="calibration"), whole.tokenizer, samples=4, seq_len=256, seed=0
    )
    (bundle,) = calibrate(ours, learned, [parse_spec(SPEC)])
    read_path = "auto" if options.device == "cuda" else "fused"
    found, kernel = run(model, ours.seam, bundle, ids, read_path)
    errors[SPEC] = far(found, run(model, ours.seam, bundle, ids, "materialise")[0])
    heads = ours.seam.packed[0].geometry.num_kv_heads
    if rank == 0:
        report = {"kv_heads": heads, "errors": errors, "kernel": kernel}
        options.report.write_text(json.dumps(report), encoding="utf-8")
    distributed.destroy_process_group()


def split(dtype: torch.dtype, processes: int) -> PreTrainedModel:
    """Load the built-in model with this process's share of its heads."""
    plan = DistributedConfig(tp_plan="auto", tp_size=processes)
    loaded: Any = AutoModelForCausalLM.from_pretrained(
        builtin_folder(), distributed_config=plan, dtype=dtype
    )
    model: PreTrainedModel = loaded.eval()
    return model


@torch.no_grad()
def run(
    model: PreTrainedModel, seam: Seam, bundle: Bundle, ids: Tensor, read_path: str
) -> tuple[Tensor, str]:
    """Read a prompt and then token by token; return float32 logits (1, STEPS + 1, vocabulary) and
    what read the cache.
    """
    with attach(model, bundle, seam=seam, read_path=read_path) as session:
        cache = session.new_cache(bundle)
        pieces = ids.split([PROMPT] + [1] * STEPS, dim=1)
        logits = [session.model(piece, past_key_values=cache).logits[:, -1:] for piece in pieces]
    return torch.cat(logits, 1).float(), kernel_of(cache)


def far(found: Tensor, expected: Tensor) -> float:
    """Return the root mean square of a difference over that of what is expected."""
    return float((found - expected).square().mean().sqrt() / expected.square().mean().sqrt())


if __name__ == "__main__":
    main()
