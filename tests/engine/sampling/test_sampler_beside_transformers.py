"""Sampling parameters over their whole range: the tokens kept are transformers', and no value breaks a draw."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from transformers.generation.logits_process import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from engine.sampling.params import SamplingParams
from engine.sampling.sampler import Sampler, candidates

GRID = [
    *itertools.product([0.3, 1.0, 4.0], [0, 1, 3, 20, 1000], [0.05, 0.3, 0.5, 0.9, 0.999, 1.0], [0.0, 0.02, 0.3, 1.0])
]


def kept(logits: torch.Tensor, **params: Any) -> dict[int, float]:
    """Token id to probability, as ours."""
    index, weights = candidates(logits.double(), SamplingParams(**params))
    return dict(zip(index.tolist(), weights.tolist(), strict=True))


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


@pytest.mark.parametrize("spread", [0.2, 1.0, 3.0, 10.0])
@pytest.mark.parametrize("vocabulary", [1, 2, 7, 500])
def test_the_tokens_kept_are_those_that_transformers_keeps(spread: float, vocabulary: int) -> None:
    generator = torch.Generator().manual_seed(vocabulary)
    for temperature, top_k, top_p, min_p in GRID:
        logits = torch.randn(vocabulary, generator=generator) * spread
        ours = kept(logits, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
        expected = theirs(logits, temperature, top_k, top_p, min_p)
        assert ours == pytest.approx(expected, rel=1e-9), (temperature, top_k, top_p, min_p)


def test_top_p_is_of_what_top_k_left() -> None:
    logits = torch.log(torch.tensor([0.4, 0.3, 0.2, 0.1]))
    assert set(kept(logits, temperature=1.0, top_k=2, top_p=0.5)) == {0}, "0.4 of 0.7 is more than half"
    assert set(kept(logits, temperature=1.0, top_p=0.5)) == {0, 1}


def test_what_ties_with_the_last_of_top_k_stays_as_in_transformers() -> None:
    logits = torch.tensor([2.0, 1.0, 3.0, 2.0, 2.0, 0.0])
    assert set(kept(logits, temperature=1.0, top_k=2)) == {2, 0, 3, 4} == set(theirs(logits, 1.0, 2, 1.0, 0.0))
    assert list(kept(logits, temperature=1.0, top_p=0.5)) == [2, 0], "of equals the lowest ids"


def test_the_repetition_penalty_is_that_of_transformers() -> None:
    logits = torch.randn(50, generator=torch.Generator().manual_seed(3))
    for penalty in (0.5, 1.3, 20.0):
        sampler = Sampler(SamplingParams(repetition_penalty=penalty), [3, 4, 4, 9, 30], frozenset())
        penalise = RepetitionPenaltyLogitsProcessor(penalty)
        expected = penalise(torch.tensor([[3, 4, 9, 30]]), logits[None].clone())[0]
        assert sampler.choose(logits).token_id == int(expected.argmax())


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
    logits = torch.tensor(scores)
    stops = frozenset(token for token in stops if token < len(scores))
    sampler = Sampler(params, [token for token in prompt if token < len(scores)], stops)
    possible = {token for token, score in enumerate(scores) if score > float("-inf")}
    if not possible:
        with pytest.raises(ArithmeticError, match="-inf"):
            sampler.choose(logits)
        return
    for index in range(4):
        allowed = (possible - stops if index < params.min_tokens else possible) or possible
        assert sampler.choose(logits).token_id in allowed
    assert torch.equal(logits, torch.tensor(scores)), "the caller's logits stay as they are"


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_model_that_gives_no_number_is_said_to(temperature: float) -> None:
    for logits in ([1.0, float("nan")], [float("-inf")] * 2):
        with pytest.raises(ArithmeticError, match="logits: the model gave"):
            Sampler(SamplingParams(temperature=temperature), [], frozenset()).choose(torch.tensor(logits))


def test_a_weight_of_zero_is_never_drawn() -> None:
    logits = torch.tensor([0.0, 800.0, -1e30, 799.0])
    assert set(kept(logits, temperature=1.0)) == {1, 3}, "exp(-800) is 0 in fp64"
    assert set(kept(logits, temperature=1e-45)) == {1}
