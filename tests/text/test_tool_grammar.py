"""Grammars of calls: what they allow parses as calls, and a schema that cannot be guaranteed is named."""

from __future__ import annotations

import json

import jsonschema
import pytest

from tests.text.test_grammar import BYTE_LEVEL, answer, compiler
from text.errors import TextRefused
from text.tool_grammar import CallForm, calls, literal

WEATHER = {
    "properties": {"town": {"enum": ["Tarn", "Crystalton"]}},
    "required": ["town"],
    "additionalProperties": False,
}
COUNT = {"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"], "additionalProperties": False}


def form(name: str, schema: object) -> CallForm:
    before = f'<tool_call>\n{{"name": "{name}", "arguments": '
    return CallForm(before, schema, "}\n</tool_call>")  # type: ignore[arg-type]


def test_every_answer_is_a_call() -> None:
    source = calls(BYTE_LEVEL, [form("weather", WEATHER), form("count", COUNT)])
    compiled = compiler().compile("lark", source)
    named = set()
    for seed in range(20):
        text = BYTE_LEVEL.decode(answer(compiled.matcher(), seed))
        call = json.loads(text.removeprefix("<tool_call>\n").removesuffix("\n</tool_call>"))
        named.add(call["name"])
        jsonschema.validate(call["arguments"], {"weather": WEATHER, "count": COUNT}[call["name"]])
    assert named == {"weather", "count"}


def test_several_calls_one_behind_the_other() -> None:
    source = calls(BYTE_LEVEL, [form("weather", WEATHER)], several=True, between="\n", opening="So: ")
    texts = [BYTE_LEVEL.decode(answer(compiler().compile("lark", source).matcher(), seed)) for seed in range(8)]
    assert all(text.startswith('So: <tool_call>\n{"name": "weather"') for text in texts)
    assert {text.count("</tool_call>") for text in texts} >= {1, 2}


def test_special_tokens_in_the_words_are_tokens_of_the_answer() -> None:
    assert literal(BYTE_LEVEL, 'a "b"<|user|>\n') == '"a \\"b\\"" <[4]> "\\n"'
    source = calls(BYTE_LEVEL, [CallForm("<|user|>", COUNT, "<|system|>")])
    tokens = answer(compiler().compile("lark", source).matcher(), 0)
    assert (tokens[0], tokens[-1]) == (4, 2)


def test_schemas_that_cannot_be_guaranteed_are_named() -> None:
    with pytest.raises(TextRefused, match=r"forms\[1\]: at /patternProperties"):
        calls(BYTE_LEVEL, [form("a", {}), form("b", {"patternProperties": {}})])
    with pytest.raises(TextRefused, match="no tool"):
        calls(BYTE_LEVEL, [])
