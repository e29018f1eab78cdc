"""What the torch that runs the tests can do; the oldest that is allowed cannot do everything."""

from inspect import signature

import pytest
import torch
from torch.distributed.tensor import distribute_tensor


def writes_grouped_scores() -> bool:
    """Tell whether sdpa writes scores out on a CPU where query heads share keys, as in 2.6."""
    query, key = torch.zeros(1, 4, 1, 16), torch.zeros(1, 2, 9, 16)
    chosen = torch._fused_sdp_choice(query, key, key, None, 0.0, False, scale=None, enable_gqa=True)
    return chosen == 0


# Planned peaks are those of an sdpa that does not.
needs_grouped_sdpa = pytest.mark.skipif(
    writes_grouped_scores(), reason="this torch's sdpa writes scores of grouped heads out"
)
needs_split_models = pytest.mark.skipif(
    "src_data_rank" not in signature(distribute_tensor).parameters,
    reason="transformers splits models by head with torch 2.7 and later",
)
