"""Where the cascade kernels split chunks and tails follows from a layer's shape."""

from __future__ import annotations

import pytest
import torch

from engine.run.cuda.cascade.tuning import DEFAULT_SPLITS, FEW_HEADS_SPLITS, AttentionShape, tuning_for


@pytest.mark.parametrize("hopper", [True, False])
@pytest.mark.parametrize("dim", [64, 128, 256, 512])
def test_few_kv_heads_have_splits_of_half_the_tokens(hopper: bool, dim: int) -> None:
    for kv_heads in (1, 2, 4, 5, 8, 32):
        found = tuning_for(AttentionShape(32 if kv_heads != 5 else 40, kv_heads, dim, torch.bfloat16), hopper).splits
        assert found == (FEW_HEADS_SPLITS if kv_heads <= 4 else DEFAULT_SPLITS)


def test_of_half_the_tokens_means_each_split() -> None:
    assert FEW_HEADS_SPLITS.tail * 2 == DEFAULT_SPLITS.tail
    assert [(first, tokens * 2) for first, tokens in FEW_HEADS_SPLITS.chunk] == list(DEFAULT_SPLITS.chunk)
