"""Rows are counted as if they stood at their positions, for as long as it is said, and the module stays as it came."""

from __future__ import annotations

import torch
from torch import nn
from transformers import DynamicCache

from engine.model.numbered import TokensBefore, counting_modules, first_scaled, scaled_early, told_positions
from tests.architectures import build

LLAMA4 = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "num_local_experts": 2}


def test_modules_that_count_are_those_whose_queries_are_scaled() -> None:
    model = build("llama4_text", LLAMA4 | {"intermediate_size_mlp": 96, "floor_scale": 50})
    modules = counting_modules(model)
    assert len(modules) == 3 and first_scaled(modules) == 49
    with scaled_early(modules):
        assert first_scaled(modules) == 1
    assert first_scaled(modules) == 49
    assert counting_modules(build("llama", {})) == [] and first_scaled([]) is None


def test_rows_are_told_how_far_their_positions_are_from_their_numbers() -> None:
    class Counting(nn.Module):
        def forward(self, rows: int, *, past_key_values: TokensBefore | None = None) -> torch.Tensor:
            before = 0 if past_key_values is None else past_key_values.get_seq_length(7)
            return torch.arange(rows) + before

    module, positions = Counting(), torch.tensor([900, 3, 4])
    with told_positions([module], positions):
        assert torch.equal(module(3), positions)
    assert module(3).tolist() == [0, 1, 2]


def test_keys_and_values_go_to_the_cache_if_there_is_one() -> None:
    keys, values = torch.zeros(1, 2, 3, 4), torch.ones(1, 2, 3, 4)
    assert TokensBefore(torch.zeros(3), None).update(keys, values, 0) == (keys, values)
    cache = DynamicCache()
    TokensBefore(torch.zeros(3), cache).update(keys, values, 0)
    assert cache.get_seq_length(0) == 3
