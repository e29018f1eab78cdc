"""kivi against its definition in float64: ranges over groups of tokens, and what stays exact."""

import numpy as np
import pytest
import torch
from torch import Tensor

from kvqtool.codebook import Codebook
from kvqtool.errors import RunError, SpecError
from kvqtool.memory import LayerGeometry, Outliers, part_buffers, split_tokens
from kvqtool.methods import get_method
from kvqtool.seam import LayerSeam
from kvqtool.spec import parse_spec
from kvqtool.store import LayerStore

GROUP = 16
SEAM = LayerSeam(0, LayerGeometry(2, 16, 24), None, True, None, None, "")
SPEC = parse_spec("kivi3-g16-sink1-r5")


def half(values: np.ndarray) -> np.ndarray:
    return values.astype(np.float16).astype(np.float64)


def by_definition(group: np.ndarray, bits: int) -> np.ndarray:
    """Quantize (tokens, channels): a range for each channel over the group, rounded to its grid."""
    low, high = group.min(0), group.max(0)
    scale, offset = half((high - low) / 2), half((high + low) / 2)
    levels = half(np.linspace(-1, 1, 1 << bits))
    u = (group - offset) / scale
    return levels[np.abs(u[..., None] - levels).argmin(-1)] * scale + offset


def new_store() -> LayerStore:
    books = [Codebook(*get_method("kivi").fit(side, None)) for side in (SPEC.key, SPEC.value)]
    return LayerStore(SPEC, (books[0], books[1]), SEAM)


def states(tokens: int, batch: int = 2) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(tokens)
    return (
        torch.randn(batch, 2, tokens, 16, generator=generator),
        torch.randn(batch, 2, tokens, 24, generator=generator),
    )


def no_angles(start: int, stop: int) -> tuple[Tensor, Tensor]:
    raise AssertionError("nothing rotates here")


def test_keys_are_the_definition_and_the_newest_exact() -> None:
    store, (key, value) = new_store(), states(45)
    store.append(key, value, no_angles)
    read = store.read(no_angles)[0]
    # 45 tokens: a sink, 2 groups of 16, and 12 exact: 5 of the window and 7 of no whole group.
    assert torch.equal(read[:, :, :1], key[:, :, :1])
    assert torch.equal(read[:, :, 33:], key[:, :, 33:])
    for batch in range(2):
        for head in range(2):
            for start in (1, 17):
                group = key[batch, head, start : start + GROUP].double().numpy()
                found = read[batch, head, start : start + GROUP].double().numpy()
                assert np.abs(found - by_definition(group, 3)).max() < 1e-5


def test_one_by_one_is_bulk_and_bytes_are_planned() -> None:
    bulk, single, (key, value) = new_store(), new_store(), states(70)
    bulk.append(key, value, no_angles)
    for token in range(70):
        single.append(key[:, :, token : token + 1], value[:, :, token : token + 1], no_angles)
        parts = split_tokens(SPEC, token + 1)
        table = part_buffers(SPEC, SEAM.geometry, 2, parts, Outliers(0, 0), "float32")
        held = {
            name: sum(t.numel() * t.element_size() for t in tensors)
            for name, tensors in single.tensors.items()
        }
        assert held == {name: buffer.nbytes for name, buffer in table.items()}
    for mine, theirs in zip(single.read(no_angles), bulk.read(no_angles), strict=True):
        assert torch.equal(mine, theirs)


def test_sequences_can_be_reordered_and_whole_groups_cropped() -> None:
    store, (key, value) = new_store(), states(45)
    store.append(key, value, no_angles)
    before = store.read(no_angles)[0]
    store.select(torch.tensor([1, 0, 1]))
    assert torch.equal(store.read(no_angles)[0], before[[1, 0, 1]])
    store.truncate(17)
    assert torch.equal(store.read(no_angles)[0], before[[1, 0, 1], :, :17])
    with pytest.raises(RunError, match="12 tokens end within a group of 16 that share ranges"):
        store.truncate(12)


@pytest.mark.parametrize("text", ("kivi2", "kivi2-g24", "kivi2-g32-1%", "kivi2-g32-pertoken"))
def test_what_it_cannot_be_is_refused(text: str) -> None:
    with pytest.raises(SpecError, match="kivi2"):
        parse_spec(text)


def test_an_effective_bit_is_what_the_paper_says() -> None:
    """2 bits and a 16-bit scale and offset for 32 numbers: 3 bits."""
    spec = parse_spec("kivi2-g32")
    parts = split_tokens(spec, 4096)
    table = part_buffers(spec, LayerGeometry(2, 64, 64), 1, parts, Outliers(0, 0), "float16")
    assert sum(buffer.nbytes for buffer in table.values()) * 8 == 3 * 4096 * 256
