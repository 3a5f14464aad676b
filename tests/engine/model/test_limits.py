"""Limits from a configuration alone; no model runs."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from engine.model.limits import ContextLimit, declared_limit, rope_settings, spread

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
        ({"n_positions": 512, "attention_chunk_size": 128, "sliding_window": 32}, 512, ""),
        ({"max_target_positions": 448}, 448, ""),
        ({"n_positions": 512, "floor_scale": 100, "attn_temperature_tuning": True}, 512, ""),
    ],
)
def test_what_a_configuration_names(config: dict[str, Any], tokens: int, words: str) -> None:
    limit = declared_limit(SimpleNamespace(**config))
    assert limit.tokens == tokens and words in limit.because and bool(words) is bool(limit.because)


def test_the_least_cap_and_its_reason_stay() -> None:
    limit = ContextLimit(100, 100).capped(50, "first").capped(70, "longer").capped(50, "the same")
    assert limit == ContextLimit(50, 100, "first")
    assert str(limit) == "50 of 100 tokens, because first" and str(ContextLimit(9, 9)) == "9 tokens"


def test_positions_spread_over_powers_of_two_and_their_neighbours() -> None:
    assert spread(0) == [0]
    assert spread(9) == [0, 1, 2, 3, 4, 5, 7, 8, 9]
    assert {49, 50, 51} <= set(spread(100, [50])) and max(spread(100, [100])) == 100


def test_settings_of_each_kind_of_layer() -> None:
    assert rope_settings(SimpleNamespace()) == [{}]
    assert rope_settings(SimpleNamespace(rope_scaling=YARN)) == [YARN]
    assert rope_settings(SimpleNamespace(rope_parameters={"full": YARN, "sliding": {}})) == [YARN, {}]
