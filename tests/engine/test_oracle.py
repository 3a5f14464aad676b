"""Greedy tokens and logits equal transformers' eager attention under every mode's mask, on many architectures."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from engine.model.borrowed import BorrowedModel, ModelRefused
from engine.reuse import ReuseMode
from engine.served import ServedModel, serve
from tests import oracle
from tests.architectures import ARCHITECTURES, EXACT_ONLY, MORE, NAMED, RARE, REFUSED, build, build_named
from tests.engine.composer import Composer

MODES = ("exact", "anchored", "independent")
LENGTHS = st.sampled_from([1, 2, 7, 8, 9, 15, 16, 17, 33])


@functools.cache
def served(name: str) -> ServedModel:
    """Served in pieces of 24 tokens, so that most compositions cross pieces."""
    return serve(BorrowedModel(build_named(name), name=name), piece_tokens=24)


def tokens(seed: int, count: int) -> list[int]:
    return torch.randint(0, 211, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


@st.composite
def compositions(draw: st.DrawFn) -> tuple[list[list[int]], list[int], str]:
    """1 to 6 chunks, some repeated, in any order, and a query; lengths around page boundaries (pages of 8)."""
    library = [tokens(seed, draw(LENGTHS)) for seed in range(draw(st.integers(1, 4)))]
    picks = draw(st.lists(st.integers(0, len(library) - 1), min_size=1, max_size=6))
    return [library[i] for i in picks], tokens(99, draw(LENGTHS)), draw(st.sampled_from(MODES))


def agree(name: str, batch: list[tuple[list[list[int]], list[int], str]], count: int = 4) -> None:
    composer = Composer(served(name), pages=256, page_size=8)
    for (chunks, query, mode), (ids, logits) in zip(batch, composer.generate(batch, count), strict=True):
        expected, expected_logits = oracle.greedy(build_named(name), chunks, query, mode, count)
        assert ids == expected, (name, mode, [len(c) for c in chunks], len(query))
        torch.testing.assert_close(logits, expected_logits, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", NAMED)
@pytest.mark.parametrize("mode", MODES)
def test_every_mode_on_every_named_architecture(name: str, mode: str) -> None:
    chunks = [tokens(1, 17), tokens(2, 1), tokens(3, 30), tokens(1, 17), tokens(4, 8)]
    agree(name, [(chunks, tokens(5, 9), mode)])


@pytest.mark.parametrize("name", [
    *(name for name in ARCHITECTURES if name not in NAMED),
    *(pytest.param(name, marks=pytest.mark.slow) if name in RARE else name for name in MORE),
])  # fmt: skip
def test_every_mode_on_more_architectures(name: str) -> None:
    """One batch of all modes."""
    chunks = [tokens(1, 17), tokens(2, 1), tokens(3, 30), tokens(1, 17), tokens(4, 8)]
    assert not any(served(name).refusals.values()), served(name).refusals
    agree(name, [(chunks, tokens(5, 9), mode) for mode in MODES], count=2)


@pytest.mark.slow
@pytest.mark.parametrize("name", [*(name for name in ARCHITECTURES if name not in NAMED), *MORE])
@settings(max_examples=6, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
@given(batch=st.lists(compositions(), min_size=1, max_size=5))
def test_random_compositions_of_all(name: str, batch: list[tuple[list[list[int]], list[int], str]]) -> None:
    agree(name, batch, count=3)


@pytest.mark.parametrize("name", NAMED)
@settings(max_examples=12, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
@given(batch=st.lists(compositions(), min_size=1, max_size=5))
def test_random_compositions_in_mixed_batches(name: str, batch: list[tuple[list[list[int]], list[int], str]]) -> None:
    agree(name, batch, count=3)


@pytest.mark.parametrize("name", EXACT_ONLY)
def test_a_model_whose_chunks_cannot_move_is_served_exactly_only(name: str) -> None:
    assert not served(name).refusals[ReuseMode.EXACT]
    for mode in (ReuseMode.ANCHORED, ReuseMode.INDEPENDENT):
        assert "cannot be moved" in served(name).refusals[mode]
    agree(name, [([tokens(1, 17), tokens(2, 9)], tokens(3, 5), "exact")])


@pytest.mark.parametrize("name", REFUSED)
def test_a_model_that_cannot_be_exact_is_refused_with_the_reason(name: str) -> None:
    with pytest.raises(ModelRefused, match="attention calls for"):
        serve(BorrowedModel(build_named(name), name=name))


def test_a_model_whose_attention_sees_more_than_the_mask_is_refused() -> None:
    model = build("llama", {"num_attention_heads": 4, "num_key_value_heads": 2})
    inner = model.model.layers[1].self_attn.forward

    def leaking(hidden_states: torch.Tensor, *args: object, **kwargs: Any) -> object:
        return inner(hidden_states + 0.5 * hidden_states.roll(1, dims=1), *args, **kwargs)

    model.model.layers[1].self_attn.forward = leaking
    with pytest.raises(ModelRefused, match="cannot be served exactly"):
        serve(BorrowedModel(model, name="leaking"))


def test_yarn_is_turned_by_its_own_table_once() -> None:
    rotation = served("llama-yarn").findings.rotations[0]
    assert rotation is not None
    assert build_named("llama-yarn").model.rotary_emb.attention_scaling > 1.0
