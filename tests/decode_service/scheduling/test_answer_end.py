"""What ends an answer: a stop token behind enough others, its length, its grammar."""

from __future__ import annotations

from typing import Any

import pytest

from decode_service.scheduling.answer_end import end_behind
from decode_service.scheduling.sequence import Failed, Finished, FinishReason
from tests.decode_service.scheduling.scheduled import EOS, Scheduled, request
from text.grammar.matcher import GrammarFailed


@pytest.mark.parametrize("min_tokens", [0, 3])
def test_a_stop_token_ends_an_answer_that_is_long_enough(min_tokens: int) -> None:
    on = Scheduled()
    one = request("one", max_tokens=6)
    one.params.__dict__["min_tokens"] = min_tokens
    on.submit(one)
    for _ in range(9):
        on.step(EOS)
    assert on.reason(one) is FinishReason.STOP and len(one.generated) == max(1, min_tokens)
    on.check_idle()


class Followed:
    """A grammar that is over behind so many tokens, or cannot take the next one."""

    def __init__(self, over_behind: int, breaks: bool = False) -> None:
        self._left = over_behind
        self._breaks = breaks
        self.taken: list[int] = []

    def accept(self, token_id: int) -> None:
        if self._breaks:
            raise GrammarFailed("too many states")
        self.taken.append(token_id)
        self._left -= 1

    @property
    def is_over(self) -> bool:
        return self._left == 0


def test_a_grammar_ends_its_answer_before_its_length_does_and_takes_every_token() -> None:
    one = request("one", max_tokens=3)
    grammar: Any = Followed(2)
    one.grammar = grammar
    one.generated.append(7)
    assert end_behind(one, 7, frozenset({EOS})) is None
    one.generated.append(8)
    assert end_behind(one, 8, frozenset({EOS})) == Finished(FinishReason.STOP) and grammar.taken == [7, 8]


def test_a_grammar_that_cannot_go_on_fails_its_answer_and_names_the_field() -> None:
    one = request("one", max_tokens=1)
    grammar: Any = Followed(9, breaks=True)
    one.grammar = grammar
    one.generated.append(7)
    end = end_behind(one, 7, frozenset({EOS}))
    assert isinstance(end, Failed) and str(end.error).startswith("grammar: too complex to go on: too many states")


def test_its_length_ends_an_answer_that_no_token_stops() -> None:
    one = request("one", max_tokens=2)
    one.generated += [7]
    assert end_behind(one, 7, frozenset({EOS})) is None
    one.generated += [EOS]
    assert end_behind(one, EOS, frozenset()) == Finished(FinishReason.LENGTH)
    assert end_behind(one, EOS, frozenset({EOS})) == Finished(FinishReason.STOP)
