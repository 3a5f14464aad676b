"""Which row says which token of a prompt, in every mode and however the rows are cut."""

from __future__ import annotations

import random

import pytest

from decode_service.prompt.composition import Composition
from decode_service.prompt.scores import PromptScores
from engine.reuse import ReuseMode
from engine.sampling.params import Choice
from tests.decode_service.prompts import composed

A, B, C, QUERY = (11, 12, 13), (21, 22), (31,), (41, 42)


def said(composition: Composition, seed: int = 0) -> dict[int, tuple[int | None, int, int]]:
    """Of each place the part (None: the tail), its row and the token that is wanted; rows are cut at random."""
    rng, scores, found = random.Random(seed), PromptScores(composition, 2), {}
    parts: list[tuple[int | None, int]] = [
        (index, len(chunk.token_ids)) for index, chunk in enumerate(composition.chunks)
    ]
    for part, rows in [*parts, (None, len(composition.tail) + 3)]:  # and rows of tokens that were generated
        first = 0
        while first < rows:
            count = rng.randint(1, rows - first)
            scored, places = scores.wanted(part, first, count)
            if scored is None:
                assert not places
            else:
                assert scored.top == 2 and list(scored.wanted) == sorted(scored.wanted, key=lambda pair: pair[0])
                for place, (row, token) in zip(places, scored.wanted, strict=True):
                    assert place not in found and row < count
                    found[place] = (part, first + row, token)
            first += count
    return found


@pytest.mark.parametrize(
    ("mode", "firsts"),
    [
        (ReuseMode.EXACT, {3: (0, 2), 5: (1, 1), 6: (2, 0)}),
        (ReuseMode.ANCHORED, {3: (0, 2), 5: (0, 2), 6: (2, 0)}),
        (ReuseMode.INDEPENDENT, {6: (2, 0)}),
    ],
)
def test_the_row_before_a_token_says_it(mode: ReuseMode, firsts: dict[int, tuple[int, int]]) -> None:
    composition = composed(A, B, C, query=QUERY, mode=mode)
    within = {1: (0, 0, 12), 2: (0, 1, 13), 4: (1, 0, 22), 7: (None, 0, 42)}
    tokens = composition.token_ids()
    expected = within | {place: (*row, tokens[place]) for place, row in firsts.items()}
    for seed in range(5):
        assert said(composition, seed) == expected


def test_a_query_alone_and_one_that_is_a_chunk() -> None:
    assert said(composed(query=(5, 6, 7))) == {1: (None, 0, 6), 2: (None, 1, 7)}
    assert said(composed(query=(5,))) == {}
    assert said(composed(A, query=(5, 6), query_by_id=True)) == {
        1: (0, 0, 12), 2: (0, 1, 13), 3: (0, 2, 5), 4: (1, 0, 6),
    }  # fmt: skip


def test_all_is_there_once_everything_was_found() -> None:
    scores = PromptScores(composed(A, B, query=(9,), mode=ReuseMode.INDEPENDENT), 0)
    for part, rows in ((0, 3), (1, 2)):
        assert scores.all() is None
        _, places = scores.wanted(part, 0, rows)
        scores.note(places, [Choice(place, -0.5 * place) for place in places])
    told = [(11, None), (12, -0.5), (13, -1.0), (21, None), (22, -2.0), (9, -2.5)]
    assert [(token, found and found.logprob) for token, found in scores.all() or []] == told
    assert PromptScores(composed(query=(5,)), 0).all() == [(5, None)]
