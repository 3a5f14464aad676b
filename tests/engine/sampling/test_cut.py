"""Sampling parameters over their whole range: the tokens kept are transformers', and no value breaks a draw."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from transformers.generation.logits_process import (
    LogitsProcessorList,
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from engine.sampling.cut import kept, kth_largest
from engine.sampling.params import Draw, SamplingParams, SamplingRequest
from engine.sampling.sampler import HostSlots

GRID = [
    *itertools.product([0.3, 1.0, 4.0], [0, 1, 3, 20, 1000], [0.05, 0.3, 0.5, 0.9, 0.999, 1.0], [0.0, 0.02, 0.3, 1.0])
]


def ours(scores: torch.Tensor, **params: Any) -> dict[int, float]:
    """Token id to weight."""
    tokens, weights = kept(scores.float().numpy(), SamplingParams(**params))
    return dict(zip(tokens.tolist(), weights.tolist(), strict=True))


def theirs(logits: torch.Tensor, temperature: float, top_k: int, top_p: float, min_p: float) -> dict[int, float]:
    """Token id to probability after transformers' own warpers in the order of its ``generate``, in fp64."""
    warpers = LogitsProcessorList([TemperatureLogitsWarper(temperature)])
    if top_k:
        warpers.append(TopKLogitsWarper(top_k))
    if top_p < 1.0:
        warpers.append(TopPLogitsWarper(top_p))
    warpers.append(MinPLogitsWarper(min_p))
    weights = torch.softmax(warpers(torch.zeros(1, 1, dtype=torch.int64), logits.double()[None]), -1)[0]
    return {int(token): float(weights[token]) for token in weights.nonzero()[:, 0]}


def compare(logits: torch.Tensor, temperature: float, top_k: int, top_p: float, min_p: float) -> None:
    """The same tokens, but for what ties with the last that top_p keeps, and for weights below 2^-40."""
    found = ours(logits, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    expected = theirs(logits, temperature, top_k, top_p, min_p)
    largest = max(expected.values())
    assert {token for token, weight in expected.items() if weight > 2.0**-40 * largest} <= set(found)
    last = min(float(logits[token]) for token in expected)
    assert all(float(logits[token]) == last for token in set(found) - set(expected)), "ties with the last"
    if set(found) == set(expected):
        total = sum(found.values())
        assert {token: weight / total for token, weight in found.items()} == pytest.approx(
            expected, rel=1e-9, abs=1e-12
        )


@pytest.mark.parametrize("spread", [0.2, 1.0, 3.0, 10.0])
@pytest.mark.parametrize("vocabulary", [1, 2, 7, 500])
def test_the_tokens_kept_are_those_that_transformers_keeps(spread: float, vocabulary: int) -> None:
    generator = torch.Generator().manual_seed(vocabulary)
    for temperature, top_k, top_p, min_p in GRID:
        logits = torch.randn(vocabulary, generator=generator) * spread
        compare(logits, temperature, top_k, top_p, min_p)


def shape_of(kind: str, values: torch.Tensor) -> torch.Tensor:
    """Logits of several kinds from normal ones."""
    return {
        "normal": values * 2,
        "bf16": (values * 3).bfloat16().float(),
        "fp16": (values * 3).half().float(),
        "few values": values.round(),
        "one above all": values + 20 * (values == values.max()),
        "some impossible": torch.where(values < -0.5, float("-inf"), values),
        "far below": values - 1000,
    }[kind]


KINDS = ["normal", "bf16", "fp16", "few values", "one above all", "some impossible", "far below"]


@settings(max_examples=300, deadline=None)
@given(
    st.sampled_from(KINDS),
    st.integers(2, 200),
    st.integers(0, 2**31),
    st.floats(0.05, 5.0),
    st.integers(0, 40),
    st.floats(0.01, 1.0),
    st.sampled_from([0.0, 0.01, 0.1, 0.5, 1.0]),
)
def test_they_are_for_any_parameters_and_kind_of_logits(
    kind: str, vocabulary: int, seed: int, temperature: float, top_k: int, top_p: float, min_p: float
) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits = shape_of(kind, torch.randn(vocabulary, generator=generator))
    if not bool((logits > float("-inf")).any()) or on_the_edge(logits, temperature, top_k, top_p, min_p):
        return
    compare(logits, temperature, top_k, top_p, min_p)


def on_the_edge(logits: torch.Tensor, temperature: float, top_k: int, top_p: float, min_p: float) -> bool:
    """Whether rounding alone says which tokens stay: a sum at top_p, or a weight at min_p."""
    ranked = torch.sort(logits.double() / temperature, descending=True).values
    if 0 < top_k < len(ranked):
        ranked = ranked[ranked >= ranked[top_k - 1]]
    sums = torch.softmax(ranked, 0).cumsum(0)
    share = torch.exp(ranked - ranked[0])
    return bool(((sums - top_p).abs() < 1e-9).any() or ((share - min_p).abs() < 1e-9)[share < 1.0].any())


def test_top_p_is_of_what_top_k_left() -> None:
    logits = torch.log(torch.tensor([0.4, 0.3, 0.2, 0.1]))
    assert set(ours(logits, temperature=1.0, top_k=2, top_p=0.5)) == {0}, "0.4 of 0.7 is more than half"
    assert set(ours(logits, temperature=1.0, top_p=0.5)) == {0, 1}


def test_what_ties_with_the_last_stays() -> None:
    logits = torch.tensor([2.0, 1.0, 3.0, 2.0, 2.0, 0.0])
    assert set(ours(logits, temperature=1.0, top_k=2)) == {2, 0, 3, 4} == set(theirs(logits, 1.0, 2, 1.0, 0.0))
    assert set(ours(logits, temperature=1.0, top_p=0.5)) == {2, 0, 3, 4}, "transformers keeps some of those that tie"


@pytest.mark.parametrize("length", [1, 63, 64, 65, 1000, 6400])
def test_the_kth_largest_is_that_of_a_sort(length: int) -> None:
    generator = np.random.default_rng(length)
    for scores in (generator.normal(size=length), generator.integers(0, 5, length), np.full(length, -np.inf)):
        ranked = np.sort(scores.astype(np.float32))[::-1]
        for k in {1, 2, length // 64, length // 64 + 1, length // 2, length} & set(range(1, length + 1)):
            assert kth_largest(scores.astype(np.float32), k) == ranked[k - 1]


FLOATS = st.floats(width=32) | st.sampled_from([1e-45, 1e-38, 1e-30, 0.5, 1.0, 2.0, -2.0, 100.0, 3e38])
PARAMETERS = st.fixed_dictionaries(
    {},
    optional={
        "temperature": FLOATS,
        "top_p": FLOATS,
        "top_k": st.integers(0, 2**32 - 1) | st.integers(0, 12),
        "min_p": FLOATS,
        "frequency_penalty": FLOATS,
        "presence_penalty": FLOATS,
        "repetition_penalty": FLOATS,
        "min_tokens": st.integers(0, 5),
        "seed": st.integers(0, 2**63 - 1),
        "logprobs": st.booleans(),
    },
)
LOGITS = st.lists(
    st.floats(-30.0, 30.0, width=32)
    | st.sampled_from([0.0, -0.0, 1.0, 3e38, -3e38, 1e-45, -1e-45, float("-inf"), float("inf")]),
    min_size=1,
    max_size=9,
)


@settings(max_examples=400, deadline=None)
@given(PARAMETERS, LOGITS, st.frozensets(st.integers(0, 8)), st.lists(st.integers(0, 8), max_size=6))
@example({"temperature": 1.0, "repetition_penalty": 1e-38, "top_p": 0.9}, [5.0, 4.0, 4.0], frozenset(), [0, 1])
@example({"temperature": 1e-45, "top_p": 1e-45, "min_p": 1.0}, [3e38, -3e38, 3e38], frozenset(), [])
@example({"temperature": 1.0, "min_tokens": 3}, [1.0, 2.0, float("-inf")], frozenset([0, 1]), [])
@example({"temperature": 1.0, "min_tokens": 3, "top_k": 1}, [1.0, 2.0], frozenset([0, 1]), [])
def test_no_parameters_break_a_draw_or_give_what_cannot_be(
    values: dict[str, Any], scores: list[float], stops: frozenset[int], prompt: list[int]
) -> None:
    try:
        params = SamplingParams(**values)
    except ValueError as error:
        assert any(f"sampling.{name}:" in str(error) for name in values)
        return
    logits = torch.tensor([scores])
    stops = frozenset(token for token in stops if token < len(scores))
    slots = HostSlots(1, len(scores))
    slots.open(0, SamplingRequest(params, [token for token in prompt if token < len(scores)], stops))
    possible = {token for token, score in enumerate(scores) if score > float("-inf")}
    for index in range(4):
        allowed = (possible - stops if index < params.min_tokens else possible) or possible or {-1}
        assert slots.draw(logits, [Draw(0, index, index)])[0].token_id in allowed
    assert torch.equal(logits, torch.tensor([scores])), "the caller's logits stay as they are"


def test_a_weight_of_zero_is_never_drawn() -> None:
    logits = torch.tensor([0.0, 800.0, -1e30, 799.0])
    assert set(ours(logits, temperature=1.0)) == {1, 3}
    assert set(ours(logits, temperature=1e-45)) == {1}
