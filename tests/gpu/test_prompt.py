"""Prompts packed by kernels on a GPU: what is kept, read and saved is what torch makes of them."""

from __future__ import annotations

import pytest
import torch
from fused_case import text_ids
from stores_case import Both

from kvqtool.attach import attach
from kvqtool.blockwise import attend_causal
from kvqtool.calibrate import calibrate
from kvqtool.data import calibration_windows, load_text
from kvqtool.forward import read_prompt
from kvqtool.masks import causal_mask
from kvqtool.models import LoadedModel, load_model
from kvqtool.spec import parse_spec

pytestmark = pytest.mark.gpu
KVQ3 = "nuq3-1%-sink1-pc-comp/nuq3-1%-sink1-comp"
SPECS = (
    KVQ3,
    "nuq3-1%-sink1",
    "nuq4-1%-comp/nuq2-5%-comp",
    "nuq4-1%/nuq2-5%",
    "nuq2-1%-pc",
    "nuq3-1%/nuq3-1%-vrot-comp",
    "nf4-postrope",
    "nuq3-1%-cap4",
)


@pytest.mark.parametrize("spec", SPECS)
def test_a_long_prompt_and_what_follows_it(spec: str) -> None:
    both = Both(spec, device="cuda")
    both.append(9000, 1, 1)
    both.check()
    both.append(300)
    both.check_rows()
    both.append(*[1] * 3)
    both.check()


def test_several_sequences_and_part_of_a_head() -> None:
    both = Both("nuq3-1%", width=32, batch=3, device="cuda")
    both.append(2500, 1)
    both.check()
    both.check_rows()


@pytest.mark.parametrize(("heads", "head_dim"), [(2, 64), (8, 128), (4, 256)])
def test_attention_in_parts_is_attention_at_once(heads: int, head_dim: int) -> None:
    random = torch.Generator().manual_seed(0)
    query = torch.randn(2, heads, 70, head_dim, generator=random)
    key, value = (torch.randn(2, 2, 500, head_dim, generator=random) for _ in range(2))
    query, key, value = (part.cuda().half() for part in (query, key, value))
    parts = zip(key.split(130, dim=2), value.split(130, dim=2), strict=True)
    found = attend_causal(query, parts, 430, 0.1).double()
    wide = [part.double().repeat_interleave(heads // 2, 1) for part in (key, value)]
    seen = causal_mask(70, 500, query.device)
    score = (query.double() @ wide[0].mT * 0.1).masked_fill(~seen, -torch.inf)
    assert (found - score.softmax(-1) @ wide[1]).abs().max() < 2e-3


def test_a_model_reads_a_prompt_in_parts(builtin: LoadedModel) -> None:
    text = load_text(None, part="calibration")
    windows = calibration_windows(text, builtin.tokenizer, samples=2, seq_len=160, seed=0)
    (bundle,) = calibrate(builtin, windows, [parse_spec("kvq3")])
    loaded = load_model("builtin", device="cuda", dtype="float16")
    ids, errors = text_ids(loaded, 4, 700), []
    with torch.no_grad():
        exact = builtin.model(ids).logits[:, -1]
    for read_path in ("fused", "materialise"):
        attached = attach(loaded.model, bundle, seam=loaded.seam, read_path=read_path)
        with torch.no_grad(), attached as session:
            cache = session.new_cache(bundle)
            logits = read_prompt(loaded.model, ids.cuda(), cache, 300)
        errors.append(float((logits.cpu() - exact).square().mean().sqrt()))
    # Codes of later tokens fall the other side of a middle here and there: neither is the nearer.
    assert errors[0] < 1.4 * errors[1], errors
