"""What each process of test_split.py runs: argv is a model folder and a file for what it finds."""

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
from torch import distributed

from kvqtool.attach import attach
from kvqtool.bundle import uncalibrated_bundle
from kvqtool.errors import InputError
from kvqtool.identity import identify
from kvqtool.models import load_model
from kvqtool.probe import probe
from kvqtool.spec import parse_spec


def split(folder: Path) -> Any:
    """Load a model with half of its heads."""
    from transformers import AutoModelForCausalLM
    from transformers.distributed import DistributedConfig

    plan = DistributedConfig(tp_plan="auto", tp_size=2)
    return AutoModelForCausalLM.from_pretrained(folder, distributed_config=plan).eval()


@torch.no_grad()
def main() -> None:
    """Compare a split model behind a cache with the whole one; then split what cannot be."""
    torch.set_num_threads(1)
    folder, report = map(Path, sys.argv[1:])
    distributed.init_process_group("gloo")
    builtin = load_model("builtin", device="cpu")
    ids = torch.arange(20)[None] * 7 % 256
    whole, found = load(folder / "two"), {}
    model = split(folder / "two")
    seam = probe(model)
    identity = identify(model, builtin.tokenizer, name="split").as_json()
    bundle = uncalibrated_bundle(parse_spec("fp"), identity, [layer.index for layer in seam.packed])
    with attach(model, bundle, seam=seam) as session:
        cache = session.new_cache(bundle)
        pieces = ids.split([12, 8], dim=1)
        parts = [session.model(piece, past_key_values=cache).logits for piece in pieces]
    found["error"] = (torch.cat(parts, 1) - whole(ids).logits).abs().max().item()
    found["kv_heads"] = [layer.geometry.num_kv_heads for layer in seam.packed]
    try:
        probe(split(folder / "one"))
    except InputError as error:
        found["refusal"] = str(error)
    report.write_text(json.dumps(found))
    distributed.destroy_process_group()


def load(folder: Path) -> Any:
    """Load a model whole."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder).eval()


if __name__ == "__main__":
    main()
    os._exit(0)  # threads of torch may not have ended, for which C++ would abort
