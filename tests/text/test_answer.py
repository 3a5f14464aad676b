"""The text of an answer: however tokens split it, what is shown is the text before the first stop string."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.tokenizer_for_tests import byte_level_tokenizer, sentencepiece_like
from text.answer import AnswerText, TextDelta
from text.codec import TextCodec

BYTE_LEVEL = TextCodec(byte_level_tokenizer(), "byte level")
PIECES = TextCodec(sentencepiece_like(), "pieces")


@dataclass(frozen=True)
class Drawn:
    token_id: int


class Texts:
    """A stream whose token ``i`` is the text ``texts[i]``; ``end`` comes when it is flushed."""

    def __init__(self, texts: Sequence[str], end: str = "") -> None:
        self.texts, self.end = texts, end

    def push(self, token_id: int) -> str:
        return self.texts[token_id]

    def flush(self) -> str:
        return self.end


def drawn(count: int) -> list[Drawn]:
    return [Drawn(index) for index in range(count)]


def shown(answer: AnswerText, choices: Sequence[Drawn], batch: int = 1) -> tuple[str, int, bool]:
    """All text that a caller sees, the tokens taken, and whether a stop string ended it."""
    text, taken = "", 0
    for first in range(0, len(choices), batch):
        delta: TextDelta[Drawn] = answer.push(choices[first : first + batch])
        text, taken = text + delta.text, taken + len(delta.choices)
        if delta.stopped:
            return text, taken, True
    rest, stopped = answer.flush()
    return text + rest, taken, stopped


def before_the_first_stop(text: str, stops: Sequence[str]) -> tuple[str, bool]:
    """By definition: reads a character at a time until the text ends with a stop string, the longest if several do."""
    for end in range(1, len(text) + 1):
        for stop in sorted(stops, key=len, reverse=True):
            if text[:end].endswith(stop):
                return text[: end - len(stop)], True
    return text, False


few_letters = st.text("ab·", min_size=1, max_size=4)
stop_strings = st.lists(few_letters, max_size=3)


@settings(max_examples=500, deadline=None)
@given(texts=st.lists(st.text("ab·", max_size=4), max_size=8), end=st.text("ab·", max_size=3), stops=stop_strings)
def test_any_split_shows_the_text_before_the_first_stop(texts: list[str], end: str, stops: list[str]) -> None:
    expected, stopped = before_the_first_stop("".join(texts) + end, stops)
    for batch in (1, 3, 100):
        answer = AnswerText(Texts(texts, end), stops)
        text, _, was_stopped = shown(answer, drawn(len(texts)), batch)
        assert (text, was_stopped) == (expected, stopped)


@settings(max_examples=300, deadline=None)
@given(text=st.text("aé€😀 ", max_size=8), stops=st.lists(st.text("aé€😀 ", min_size=1, max_size=3), max_size=2))
def test_stop_strings_within_and_across_characters_of_many_bytes(text: str, stops: list[str]) -> None:
    for codec in (BYTE_LEVEL, PIECES):
        ids = codec.encode(text)
        answer = AnswerText(codec.stream(), stops)
        seen, _, stopped = shown(answer, [Drawn(token) for token in ids])
        assert (seen, stopped) == before_the_first_stop(codec.decode(ids), stops)


@settings(max_examples=200, deadline=None)
@given(ids=st.lists(st.integers(0, 383), max_size=12))
def test_without_stop_strings_nothing_is_held_back(ids: list[int]) -> None:
    answer, stream = AnswerText(BYTE_LEVEL.stream(), ()), BYTE_LEVEL.stream()
    for token in ids:
        assert answer.push([Drawn(token)]).text == stream.push(token)
    assert answer.flush() == (stream.flush(), False)


def test_bytes_that_never_become_a_character_are_shown_at_the_end() -> None:
    first_of_three = BYTE_LEVEL.encode("€")[:1]
    answer = AnswerText(BYTE_LEVEL.stream(), ["x"])
    assert answer.push([Drawn(first_of_three[0])]).text == ""
    assert answer.flush() == ("\ufffd", False)


def test_a_stop_string_that_only_the_end_completes_is_not_shown() -> None:
    """Byte tokens of a sentencepiece tokenizer are text only when it is known that no more of them come."""
    ids = PIECES.encode("aé")
    spelled = [*PIECES.encode("a"), *(PIECES._backend.token_to_id(f"<0x{b:02X}>") for b in "ö".encode())]
    answer = AnswerText(PIECES.stream(), ["ö"])
    assert shown(answer, [Drawn(token) for token in spelled]) == ("a", len(spelled), True)
    assert shown(AnswerText(PIECES.stream(), ["ö"]), [Drawn(token) for token in ids])[0] == "aé"


@pytest.mark.parametrize(
    ("texts", "stops", "deltas"),
    [
        (["one ", "<", "/s", ">", "two"], ["</s>"], ["one ", "", "", ""]),
        (["one ", "<", "/b", "two"], ["</s>"], ["one ", "", "</b", "two"]),
        (["a", "b", "c"], ["abd", "bc"], ["", "", "a"]),
        (["abc"], ["abc", "b"], ["a"]),
    ],
)
def test_what_may_be_a_stop_string_waits_until_it_is_none(
    texts: list[str], stops: list[str], deltas: list[str]
) -> None:
    answer = AnswerText(Texts(texts), stops)
    assert [answer.push([choice]).text for choice in drawn(len(texts))][: len(deltas)] == deltas


def test_tokens_behind_the_stop_are_not_taken() -> None:
    answer = AnswerText(Texts(["a", "X", "b", "c"]), ["X"])
    choices: list[Any] = drawn(4)
    delta = answer.push(choices)
    assert (delta.text, delta.choices, delta.stopped, answer.tokens) == ("a", tuple(choices[:2]), True, 2)


@pytest.mark.parametrize(("min_tokens", "seen"), [(0, "a"), (2, "a"), (3, "aXb"), (5, "aXbXc")])
def test_stop_strings_before_min_tokens_are_text(min_tokens: int, seen: str) -> None:
    answer = AnswerText(Texts(["a", "X", "b", "X", "c"]), ["X"], min_tokens)
    assert shown(answer, drawn(5))[0] == seen


@pytest.mark.parametrize(
    ("texts", "stops", "seen"),
    [
        (["one ", "<", "/s", ">", "two"], ["</s>"], "one </s>"),
        (["a", "b", "c"], ["abd", "bc"], "abc"),
        (["abcd"], ["abc", "b"], "ab"),
        (["one ", "<", "/b"], ["</s>"], "one </b"),
    ],
)
def test_the_stop_string_that_ends_an_answer_is_its_end_if_that_is_asked_for(
    texts: list[str], stops: list[str], seen: str
) -> None:
    answer = AnswerText(Texts(texts), stops, include_stop=True)
    assert shown(answer, drawn(len(texts)))[0] == seen
