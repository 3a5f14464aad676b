"""What matchers allow and force, for every kind of tokenizer, and where they give up."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest
from llguidance import LLExecutor, LLParserLimits

from tests.text.grammar.answers import BYTE_LEVEL, END, PIECES, answer, compiler, mask
from tests.tokenizer_for_tests import VOCABULARY
from text.codec import TextCodec
from text.grammar import compiler as limits
from text.grammar.matcher import GrammarFailed, Matcher, fill_rows


@pytest.mark.parametrize("codec", [BYTE_LEVEL, PIECES], ids=lambda codec: codec.name)
def test_answers_are_what_the_expression_matches(codec: TextCodec) -> None:
    expression = "[abé]{2,4}(stone|wood)?-€"
    compiled = compiler(codec).compile("regex", expression)
    for seed in range(20):
        text = codec.decode(answer(compiled.matcher(), seed))
        assert re.fullmatch(expression, text), text


@pytest.mark.parametrize("codec", [BYTE_LEVEL, PIECES], ids=lambda codec: codec.name)
def test_special_tokens_and_padding_are_never_allowed(codec: TextCodec) -> None:
    """But for the end, where the answer may end."""
    vocabulary = 1000
    matcher = compiler(codec, vocabulary).compile("regex", "(?s).+").matcher()
    size = codec.for_grammars()[1]
    special = codec.for_grammars()[2]
    first = mask(matcher, vocabulary)
    assert max(first) < size and not special & set(first)
    matcher.accept(codec.encode("a")[-1])
    assert special & set(mask(matcher, vocabulary)) == {END[codec.name]}


def test_an_answer_is_over_when_nothing_can_follow() -> None:
    matcher = compiler().compile("regex", "ab?").matcher()
    for token in BYTE_LEVEL.encode("a"):
        assert not matcher.is_over
        matcher.accept(token)
    assert not matcher.is_over and END["byte level"] in mask(matcher)
    matcher.accept(END["byte level"])
    assert matcher.is_over


def test_ends_are_left_out_unless_nothing_else_can_come() -> None:
    compiled = compiler().compile("regex", "a+")
    matcher = compiled.matcher(ignore_ends=True)
    matcher.accept(BYTE_LEVEL.encode("a")[0])
    assert END["byte level"] not in mask(matcher)
    with_end = compiled.matcher()
    with_end.accept(BYTE_LEVEL.encode("a")[0])
    assert set(mask(with_end)) - set(mask(matcher)) == {END["byte level"]}


def test_a_model_without_an_end_token_ends_with_its_grammar() -> None:
    matcher = compiler(ends=[]).compile("regex", "a{2,3}").matcher()
    tokens = answer(matcher, 0)
    assert matcher.is_over and BYTE_LEVEL.decode(tokens) == "aaa"


def test_forced_tokens_one_at_a_time_are_those_of_all_at_once() -> None:
    properties = {"Crystalton is": {"const": "located in Nebulonia"}, "b": {"type": "boolean"}}
    schema = {"type": "object", "properties": properties, "required": [*properties], "additionalProperties": False}
    compiled = compiler().compile("json_schema", json.dumps(schema))
    at_once = compiled.matcher()
    forced = at_once.forced()
    assert len(forced) > 5
    one_by_one = compiled.matcher()
    for at, token in enumerate(forced):
        assert one_by_one.forced() == forced[at:]
        assert mask(one_by_one) == [token]
        one_by_one.accept(token)
    assert not one_by_one.forced() and len(mask(one_by_one)) > 1
    text = BYTE_LEVEL.decode(forced)
    assert text.startswith('{"Crystalton is": "located in Nebulonia", "b":')


def test_rows_are_filled_side_by_side() -> None:
    compiled = compiler().compile("regex", "[a-f]{3}x")
    matchers: list[Matcher | None] = [compiled.matcher() for _ in range(5)]
    over = answer_to_end(compiled.matcher())
    matchers[1], matchers[3] = None, over
    rows = np.zeros((5, VOCABULARY // 32), np.int32)
    assert fill_rows(matchers, rows, LLExecutor(2)) == [None] * 5
    assert (rows[1] == -1).all() and (rows[3] == -1).all()
    assert (rows[0] == rows[2]).all() and (rows[0] == rows[4]).all() and 0 < np.bitwise_count(rows[0]).sum() < 20


def answer_to_end(matcher: Matcher) -> Matcher:
    answer(matcher, 1)
    assert matcher.is_over
    return matcher


def test_what_is_too_complex_on_the_way_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "LIMITS", LLParserLimits(max_lexer_states=40, verbose_errors=False))
    compiled = compiler().compile("regex", ".*a.{30}b")
    with pytest.raises(GrammarFailed):
        answer(compiled.matcher(), 0)


def test_an_ambiguous_grammar_fails_before_its_masks_take_long() -> None:
    """With the library's own bounds it goes on until one mask of a large vocabulary takes two seconds."""
    matcher = compiler().compile("lark", "start: s\ns: s s s | s s | LETTER\nLETTER: /[a-zA-Z ]/").matcher()
    with pytest.raises(GrammarFailed, match="Too many items"):
        answer(matcher, 0)
