"""Limits from a configuration, windows and masks alone; no model runs."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from engine.model.borrowed import ModelRefused
from engine.model.limits import ContextLimit, cap_by_masks, cap_by_windows, declared_limit, rope_settings, spread

CPU = torch.device("cpu")
YARN = {"rope_type": "yarn", "original_max_position_embeddings": 64}


@pytest.mark.parametrize(
    ("config", "tokens", "words"),
    [
        ({"max_position_embeddings": 512}, 512, ""),
        ({"n_positions": 256}, 256, ""),
        ({}, 2**20, ""),
        ({"max_position_embeddings": 512, "rope_parameters": YARN}, 512, ""),
        ({"max_position_embeddings": 512, "rope_scaling": {"type": "dynamic"}}, 512, ""),
        ({"n_positions": 512, "rope_parameters": YARN | {"rope_type": "longrope"}}, 64, "beyond 64 tokens longrope"),
        ({"n_positions": 512, "rope_parameters": {"a": YARN, "b": YARN | {"rope_type": "dynamic"}}}, 64, "dynamic NTK"),
        ({"n_positions": 512, "attention_chunk_size": 128}, 128, "chunks of 128"),
        ({"n_positions": 512, "floor_scale": 100, "attn_temperature_tuning": True}, 99, "from position 100 on"),
        ({"n_positions": 512, "floor_scale": 100, "attn_temperature_tuning": False}, 512, ""),
    ],
)
def test_what_a_configuration_names(config: dict[str, Any], tokens: int, words: str) -> None:
    limit = declared_limit(SimpleNamespace(**config))
    assert limit.tokens == tokens and words in limit.because and bool(words) is bool(limit.because)


def test_the_least_cap_and_its_reason_stay() -> None:
    limit = ContextLimit(100, 100).capped(50, "first").capped(70, "longer").capped(50, "the same")
    assert limit == ContextLimit(50, 100, "first")
    assert str(limit) == "50 of 100 tokens, because first" and str(ContextLimit(9, 9)) == "9 tokens"


def test_windows_cap_by_the_shortest() -> None:
    limit = ContextLimit(100, 100)
    assert cap_by_windows(limit, [None, None]) is limit
    capped = cap_by_windows(limit, [None, 40, 30])
    assert capped.tokens == 30 and "2 of 3 layers have a sliding window of 30" in capped.because
    assert cap_by_windows(limit, [200]).tokens == 100


def test_masks_cap_where_they_hide_the_past_and_refuse_the_future() -> None:
    limit = ContextLimit(100, 100)

    def mask(allowed: Any) -> Any:
        return lambda batch, head, query, key: allowed(query, key)

    assert cap_by_masks(limit, [mask(lambda q, k: k <= q)], "m", CPU) == limit
    window = cap_by_masks(limit, [mask(lambda q, k: (k <= q) & (q - k < 40))], "m", CPU)
    assert window.tokens == 40 and "40 or more back" in window.because
    blocks = cap_by_masks(limit, [mask(lambda q, k: (k <= q) & ((k == 0) | (q < 63)))], "m", CPU)
    assert blocks.tokens <= 64 and "from position" in blocks.because
    with pytest.raises(ModelRefused, match="not causal"):
        cap_by_masks(limit, [mask(lambda q, k: k <= q + 1)], "m", CPU)


def test_positions_spread_over_powers_of_two_and_their_neighbours() -> None:
    assert spread(0) == [0]
    assert spread(9) == [0, 1, 2, 3, 4, 5, 7, 8, 9]
    assert {49, 50, 51} <= set(spread(100, [50])) and max(spread(100, [100])) == 100


def test_settings_of_each_kind_of_layer() -> None:
    assert rope_settings(SimpleNamespace()) == [{}]
    assert rope_settings(SimpleNamespace(rope_scaling=YARN)) == [YARN]
    assert rope_settings(SimpleNamespace(rope_parameters={"full": YARN, "sliding": {}})) == [YARN, {}]
