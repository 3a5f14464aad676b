"""Grammars without a model: what matchers allow, force and refuse, for every kind of tokenizer; bounds of compiling."""

from __future__ import annotations

import json
import random
import re
import threading
from typing import Any

import numpy as np
import pytest
from llguidance import LLExecutor, LLParserLimits

from tests.tokenizer_for_tests import VOCABULARY, byte_level_tokenizer, sentencepiece_like
from text import grammar as grammars
from text.codec import TextCodec
from text.errors import TextBusy, TextRefused
from text.grammar import Bits, GrammarCompiler, Matcher, fill_rows

BYTE_LEVEL = TextCodec(byte_level_tokenizer(), "byte level")
PIECES = TextCodec(sentencepiece_like(), "pieces")
END = {"byte level": 1, "pieces": 2}


def compiler(codec: TextCodec = BYTE_LEVEL, vocabulary: int = VOCABULARY, ends: Any = None) -> GrammarCompiler:
    return GrammarCompiler(codec, vocabulary=vocabulary, end_token_ids=[END[codec.name]] if ends is None else ends)


def mask(matcher: Matcher, vocabulary: int = VOCABULARY) -> list[int]:
    """The tokens that may come."""
    row: Bits = np.full(-(-vocabulary // 32), -1, np.int32)
    matcher.fill(row)
    return [int(token) for token in np.flatnonzero(np.unpackbits(row.view(np.uint8), bitorder="little"))]


def answer(matcher: Matcher, seed: int, *, most: int = 400, vocabulary: int = VOCABULARY) -> list[int]:
    """Tokens drawn evenly among those that may come, until nothing more can."""
    source, tokens = random.Random(seed), list[int]()
    while not matcher.is_over and len(tokens) < most:
        tokens.append(source.choice(mask(matcher, vocabulary)))
        matcher.accept(tokens[-1])
    return tokens


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


@pytest.mark.parametrize(
    ("form", "source", "complaint"),
    [
        ("regex", "ab(c", "character 3: unclosed group"),
        ("regex", "a$b", "cannot be compiled: "),
        ("regex", "(?=a)b", "character 1: look-around"),
        ("regex", "", "is empty"),
        ("lark", 'begin: "a"', "no start rule"),
        ("lark", "start: a", 'line 1, column 8: unknown name: "a"'),
        ("lark", 'start: b\nb: "x" /[/', "line 2, column 4: unclosed character class"),
        ("lark", "start: %json", "line 1, the schema behind %json: "),
        ("lark", '\nstart: %json {"properties": {"a": {"not": {}}}}', "line 2, the schema behind %json: at /prop"),
        ("json_schema", "false", "at the root: false allows nothing"),
        ("json_schema", '{"type": "object", "required": ["a"], "additionalProperties": false}', "at the root: "),
        ("json_schema", '{"type": "array", "items": {"type": "null", "enum": [1]}, "minItems": 1}', "at /items: "),
        ("json_schema", '{"items": {"$ref": "#/$defs/b"}, "$defs": {"b": {"pattern": "["}}}', "at /$defs/b: unclosed"),
        ("json_schema", '{"enum": [' + "[" * 300 + "]" * 300 + "]}", "cannot be compiled: recursion limit"),
        ("json_schema", '{"const": "\\ud800"}', "cannot be compiled: unexpected end of hex escape"),
        ("json_schema", '{"minimum": ' + "9" * 4000 + "}", "cannot be compiled: number out of range"),
        ("lark", "start: %json false", "line 1, the schema behind %json: false allows nothing"),
        ("lark", 'start: %json {"maxLength": 1e400}', "line 1, the schema behind %json: is no JSON: the number 1e400"),
    ],
)  # fmt: skip
def test_what_cannot_be_compiled_is_refused_by_place(form: Any, source: str, complaint: str) -> None:
    with pytest.raises(TextRefused) as caught:
        compiler().compile(form, source)
    assert complaint in str(caught.value)


def test_a_tokenizer_larger_than_the_model_has_no_grammars() -> None:
    with pytest.raises(TextRefused, match="tokens, the model 256"):
        compiler(vocabulary=256).compile("regex", "a")
    with pytest.raises(TextRefused, match="has no tokenizer"):
        GrammarCompiler(TextCodec(None, "bare"), vocabulary=64, end_token_ids=[1]).compile("regex", "a")


def test_what_is_compiled_is_kept_for_its_owner_within_bounds(monkeypatch: pytest.MonkeyPatch) -> None:
    made = compiler()
    first = made.compile("regex", "a+", owner="one")
    assert made.compile("regex", "a+", owner="one") is first
    assert made.compile("regex", "a+", owner="other") is not first
    assert made.compile("lark", "start: /a+/", owner="one") is not first
    monkeypatch.setattr(grammars, "KEPT_MAX", 2)
    made.compile("regex", "b+", owner="one")
    made.compile("regex", "c+", owner="one")
    assert made.compile("regex", "a+", owner="one") is not first
    monkeypatch.setattr(grammars, "KEPT_CHARACTERS_MAX", 10)
    made.compile("regex", "d" * 9)
    assert sum(len(source) for _, _, source in made._kept) <= 10


def test_compiling_is_bounded_in_number_and_time(monkeypatch: pytest.MonkeyPatch) -> None:
    made, release = compiler(), threading.Event()
    made.compile("regex", "a")
    monkeypatch.setattr(made, "_compile", lambda form, source: release.wait(60) and None)
    monkeypatch.setattr(grammars, "WAIT_S", 0.05)
    try:
        with pytest.raises(TextRefused, match="took longer than"):
            made.compile("regex", "b")
        running = [made.begin("regex", f"{index}") for index in range(grammars.OWN_WAITING_MAX - 1)]
        with pytest.raises(TextBusy, match="are being compiled"):
            made.begin("regex", "c")
        left = grammars.WAITING_MAX - grammars.OWN_WAITING_MAX  # which nobody else's keep from a tenant
        running += [made.begin("regex", f"{index}", owner="another") for index in range(left)]
        with pytest.raises(TextBusy, match="are being compiled"):
            made.begin("regex", "c", owner="a third")
        busy = made.late(running[-1])
        assert isinstance(busy, TextBusy)
    finally:
        release.set()


def test_what_is_too_complex_on_the_way_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grammars, "LIMITS", LLParserLimits(max_lexer_states=40, verbose_errors=False))
    compiled = compiler().compile("regex", ".*a.{30}b")
    with pytest.raises(grammars.GrammarFailed):
        answer(compiled.matcher(), 0)


def test_an_ambiguous_grammar_fails_before_its_masks_take_long() -> None:
    """With the library's own bounds it goes on until one mask of a large vocabulary takes two seconds."""
    matcher = compiler().compile("lark", "start: s\ns: s s s | s s | LETTER\nLETTER: /[a-zA-Z ]/").matcher()
    with pytest.raises(grammars.GrammarFailed, match="Too many items"):
        answer(matcher, 0)
