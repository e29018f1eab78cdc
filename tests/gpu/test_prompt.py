"""Prompts packed by kernels on a GPU: what is kept, read and saved is what torch makes of them."""

from __future__ import annotations

import pytest
from stores_case import Both

pytestmark = pytest.mark.gpu
KVQ3 = "nuq3-1%-sink1-pc-comp/nuq3-1%-sink1-comp"
SPECS = (
    KVQ3,
    "nuq3-1%-sink1",
    "nuq4-1%-comp/nuq2-5%-comp",
    "nuq4-1%/nuq2-5%",
    "nuq2-1%-pc",
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
