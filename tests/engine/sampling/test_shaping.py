"""What a request changes about scores, beside transformers' own processors and by hand."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from transformers.generation.logits_process import (
    MinNewTokensLengthLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    SequenceBiasLogitsProcessor,
)

from engine.sampling.params import SamplingParams, SamplingRequest
from engine.sampling.shaping import FINITE_MAX, Shaping

VOCABULARY = 50
PROMPT, GENERATED = (3, 4, 4, 9, 30), (4, 7, 7)


def shaping(stops: frozenset[int] = frozenset(), **params: Any) -> Shaping:
    made = SamplingParams(max_tokens=100, **params)
    return Shaping(SamplingRequest(made, PROMPT, stops, GENERATED), VOCABULARY)


def random_row(seed: int = 3) -> torch.Tensor:
    return torch.randn(VOCABULARY, generator=torch.Generator().manual_seed(seed)) * 3


def test_the_repetition_penalty_is_that_of_transformers() -> None:
    ids = torch.tensor([[*PROMPT, *GENERATED]])
    for penalty in (0.5, 1.3, 20.0):
        expected = RepetitionPenaltyLogitsProcessor(penalty)(ids, random_row()[None].clone())[0]
        found = shaping(repetition_penalty=penalty).shape(random_row().numpy(), 3)
        assert np.array_equal(found, expected.numpy())


def test_bias_and_min_tokens_are_those_of_transformers() -> None:
    ids = torch.tensor([[*PROMPT, *GENERATED]])
    bias = ((3, 2.5), (40, -100.0))
    row = SequenceBiasLogitsProcessor([[[token], value] for token, value in bias])(ids, random_row()[None])
    for index in (3, 4):
        early = MinNewTokensLengthLogitsProcessor(len(PROMPT), 4, [5, 6])
        padded = torch.zeros(1, len(PROMPT) + index, dtype=torch.int64)
        expected = early(padded, row.clone())[0]
        found = shaping(frozenset({5, 6}), logit_bias=bias, min_tokens=4).shape(random_row().numpy(), index)
        assert np.array_equal(found, expected.numpy())


def test_frequency_and_presence_count_the_answer_alone() -> None:
    row = random_row().numpy()
    made = shaping(frequency_penalty=0.5, presence_penalty=0.25)
    made.accept(4)
    expected = row.copy()
    expected[4] -= 0.5 * 2 + 0.25
    expected[7] -= 0.5 * 2 + 0.25
    assert np.array_equal(made.shape(row, 4), expected)


def test_penalties_come_before_bias() -> None:
    row = np.full(VOCABULARY, 2.0, np.float32)
    assert shaping(repetition_penalty=2.0, logit_bias=((3, 1.0),)).shape(row, 3)[3] == 2.0


@pytest.mark.parametrize("penalty", [1e-38, 100.0])
def test_no_penalty_makes_a_token_impossible_or_a_score_infinite(penalty: float) -> None:
    row = np.array([3e38, -3e38, -np.inf, 1.0] * 10, np.float32)
    made = Shaping(SamplingRequest(SamplingParams(repetition_penalty=penalty), range(40)), 40)
    found = made.shape(row, 0)
    assert np.array_equal(found == -np.inf, row == -np.inf)
    assert np.abs(found[found > -np.inf]).max() <= FINITE_MAX


def test_end_tokens_come_early_if_nothing_else_can() -> None:
    row = np.array([1.0, 2.0, -np.inf, 3.0], np.float32)
    made = Shaping(SamplingRequest(SamplingParams(min_tokens=3), (), frozenset({0, 1})), 4)
    assert made.shape(row, 0).tolist() == [-np.inf, -np.inf, -np.inf, 3.0]
    made.allow(np.array([0b0111], np.int32), 4)
    assert made.shape(row, 0).tolist() == [1.0, 2.0, -np.inf, -np.inf]


def test_what_changes_nothing_is_not_shaped() -> None:
    assert not shaping(temperature=1.0, top_k=3).changes(0)
    made = shaping(frozenset({1}), min_tokens=2)
    assert [made.changes(index) for index in range(3)] == [True, True, False]
    assert not shaping(min_tokens=2).changes(0), "there is nothing to forbid"
