"""Ways of answering as words, and which segment a token belongs to."""

from __future__ import annotations

from typing import Any

import pytest

from cairn.local.comparison import EAGER, FRESH, STORED, Comparison, Way, read_way, run_comparison
from engine.reuse import ReuseMode
from tests.fakes import FakeServed


@pytest.mark.parametrize(
    ("word", "kind", "mode"),
    [
        ("eager", EAGER, ReuseMode.EXACT),
        ("stored", STORED, ReuseMode.EXACT),
        ("anchored", FRESH, ReuseMode.ANCHORED),
        ("stored:independent", STORED, ReuseMode.INDEPENDENT),
        ("fresh:exact", FRESH, ReuseMode.EXACT),
    ],
)
def test_a_word_is_a_kind_a_mode_or_both(word: str, kind: str, mode: ReuseMode) -> None:
    assert read_way(word) == Way(kind, mode) and read_way(str(read_way(word))) == Way(kind, mode)


@pytest.mark.parametrize("word", ["", "blend", "stored:blend", "exact:fresh", "anchored:exact", "other:exact"])
def test_other_words_are_refused(word: str) -> None:
    with pytest.raises(ValueError, match="is not a way of answering; write"):
        read_way(word)


def test_a_token_belongs_to_a_segment() -> None:
    unused: Any = None
    comparison = Comparison(unused, unused, [2, 3, 1], "float32", 0.0, unused, [], [])
    found = [comparison.segment_of(token) for token in range(6)]
    assert found == [(0, 0), (0, 1), (1, 0), (1, 1), (1, 2), (2, 0)]
    with pytest.raises(IndexError):
        comparison.segment_of(6)


def test_what_is_longer_than_the_model_is_refused_before_anything_runs() -> None:
    served: Any = FakeServed(context_length_max=4)
    ways = (read_way("exact"), read_way("eager"))
    with pytest.raises(ValueError, match="5 tokens are more than exact has: 4 tokens"):
        run_comparison(served, [(1, 2, 3), (4, 5)], ways)
