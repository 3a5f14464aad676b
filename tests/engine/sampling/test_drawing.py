"""The quick way to a row's token gives what the definition gives: the largest weight / waiting time of those kept."""

from __future__ import annotations

import random

import numpy as np
import pytest

from engine.sampling import arithmetic, philox
from engine.sampling.cut import kept
from engine.sampling.drawing import RowDraw, draw_tokens
from engine.sampling.params import SamplingParams
from engine.sampling.shaping import FINITE_MAX
from tests.engine.sampling.cases import DTYPES, random_logits, random_request


def by_definition(draw: RowDraw) -> int:
    tokens, weights = kept(draw.scores, draw.params)
    seeds, positions = (np.full(len(tokens), value, np.uint64) for value in (draw.params.seed, draw.position))
    words = philox.words_of(seeds, positions, tokens.astype(np.uint64))
    return int(tokens[np.argmax(weights / arithmetic.waiting(words))])


@pytest.mark.parametrize("vocabulary", [1, 2, 5, 33, 700, 20000])
def test_a_draw_is_that_of_the_definition(vocabulary: int) -> None:
    source = random.Random(vocabulary)
    for number in range(12):
        draws = []
        for row in random_logits(source, 8, vocabulary, DTYPES[number % 3]).float().numpy():
            params = random_request(source, vocabulary).params
            if params.temperature > 0.0 and row.max() > -np.inf:  # NaN is not
                draws.append(RowDraw(np.minimum(row, FINITE_MAX), params, source.randrange(2**31)))
        assert draw_tokens(draws) == [by_definition(draw) for draw in draws]


def test_a_cut_too_close_for_fp32_is_decided_exactly() -> None:
    """Equal scores: top_p at and beside a whole number of them, where all of them tie, and of steps of one bit."""
    flat = np.zeros(64, np.float32)
    steps = np.nextafter(np.float32(1.0), np.float32(2.0)) ** np.arange(64, dtype=np.float32)
    for scores in (flat, steps):
        for top_p in (1e-9, 0.25, 0.25 + 1e-9, 0.25 - 1e-9, 1.0 - 1e-9):
            params = SamplingParams(temperature=1.0, top_p=top_p)
            draws = [RowDraw(scores, params, position) for position in range(40)]
            assert draw_tokens(draws) == [by_definition(draw) for draw in draws]


def test_nothing_to_draw() -> None:
    assert draw_tokens([]) == []
