"""Log-probabilities of given tokens: those of a log-softmax, and the likeliest with the lowest ids among equals."""

from __future__ import annotations

import math

import pytest
import torch

from engine.sampling.params import Scored
from engine.sampling.scoring import begin_scoring

VOCABULARY = 300


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("top", [0, 1, 20])
def test_they_are_those_of_a_log_softmax(top: int, dtype: torch.dtype) -> None:
    logits = torch.randn(7, VOCABULARY, generator=torch.Generator().manual_seed(top)).mul(8).to(dtype)
    wanted = [(0, 5), (0, 7), (3, 299), (6, 0)]
    expected = logits.double().log_softmax(-1)
    pending = begin_scoring(logits, wanted, top)
    logits.zero_()  # the next step overwrites them
    found = pending.wait()
    assert [choice.token_id for choice in found] == [5, 7, 299, 0]
    for (row, token), choice in zip(wanted, found, strict=True):
        assert choice.logprob == pytest.approx(float(expected[row, token]), abs=1e-5)
        ranked = sorted(range(VOCABULARY), key=lambda each: (-float(expected[row, each]), each))[:top]
        assert [token for token, _ in choice.top] == ranked
        assert [value for _, value in choice.top] == pytest.approx(expected[row, ranked].tolist(), abs=1e-5)


def test_of_equals_the_lowest_ids_come() -> None:
    logits = torch.zeros(2, VOCABULARY)
    logits[0, [250, 40]] = 1.0
    (first, second) = begin_scoring(logits, [(0, 1), (1, 1)], 5).wait()
    assert [token for token, _ in first.top] == [40, 250, 0, 1, 2]
    assert [token for token, _ in second.top] == [0, 1, 2, 3, 4]


def test_what_is_no_number_is_said_and_what_cannot_come_too() -> None:
    logits = torch.zeros(2, VOCABULARY)
    logits[0, 3], logits[1, 4] = float("nan"), -math.inf
    first, second = begin_scoring(logits, [(0, 1), (1, 4)], 2).wait()
    assert math.isnan(first.logprob or 0.0) and second.logprob == -math.inf and len(first.top) == 2
    (all_of_few,) = begin_scoring(torch.zeros(1, 3), [(0, 0)], 20).wait()
    assert [token for token, _ in all_of_few.top] == [0, 1, 2]


def test_blocks_have_a_bound_and_keep_the_order() -> None:
    scored = Scored(((1, 10), (4, 11), (4, 12), (5, 13), (9, 14)), top=1)
    assert scored.rows == [1, 4, 5, 9]
    assert scored.blocks(3) == [([1, 4, 5], [(0, 10), (1, 11), (1, 12), (2, 13)]), ([9], [(0, 14)])]
    assert scored.blocks(64) == [([1, 4, 5, 9], [(0, 10), (1, 11), (1, 12), (2, 13), (3, 14)])]
