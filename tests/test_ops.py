"""The operation torch sees: on a CPU it is the reference, and torch may trace it."""

from __future__ import annotations

import torch
from attention_case import Case, build

from kvqtool.fused import new_workspace
from kvqtool.ops import call_attend
from kvqtool.reading import attend_reference


def test_the_operation_on_a_cpu_is_the_reference() -> None:
    built = build(Case("nuq3-1%", (100, 30), group=2, sinks=1, softcap=30.0))
    workspace = new_workspace(built.variant, built.query, 2, blocks=4)
    out = call_attend(built.query, built.context, built.tables, built.variant, workspace)
    wanted = attend_reference(built.query, built.context, built.tables, built.variant)
    assert torch.equal(out, wanted)


def test_torch_traces_the_operation_whole() -> None:
    built = build(Case("nuq4-1%", (70,)))
    workspace = new_workspace(built.variant, built.query, 2, blocks=4)

    def step(query: torch.Tensor) -> torch.Tensor:
        return call_attend(query * 2, built.context, built.tables, built.variant, workspace) + 1

    compiled = torch.compile(step, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(built.query), step(built.query))
