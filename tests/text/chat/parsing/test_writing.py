"""Grammars of tool calls: whatever they allow is calls of the tools, in the form that the parsers read."""

from __future__ import annotations

import json
from typing import Any

import jsonschema
import pytest

from tests.text.chat.parsing.reading import read
from tests.text.grammar.answers import answer
from tests.tokenizer_for_tests import byte_level_tokenizer
from text.chat.parsing import forms
from text.chat.parsing.choice import AnswerReader
from text.chat.parsing.forms import Form
from text.codec import TextCodec
from text.errors import TextRefused
from text.grammar.compiler import GrammarCompiler

TOWN = {
    "type": "object",
    "properties": {
        "town": {"enum": ["Tarn", "Crystalton"]},
        "days": {"type": "integer", "minimum": 1, "maximum": 99},
        "where": {"type": "array", "items": {"$ref": "#/$defs/side"}, "maxItems": 2},
    },
    "required": ["town"],
    "additionalProperties": False,
    "$defs": {"side": {"enum": ["north", "south"]}},
}
TOOLS: list[dict[str, Any]] = [
    {"type": "function", "function": {"name": "get_weather", "parameters": TOWN}},
    {"name": "time", "parameters": {"properties": {}, "additionalProperties": False}},
]
SCHEMAS = {"get_weather": TOWN, "time": TOOLS[1]["parameters"]}
# What says a form: a template, and the tags that are special tokens.
WRITTEN: list[tuple[str, list[str]]] = [
    ("<tool_call>", []),
    ("<tool_call> <think>", ["<tool_call>", "</tool_call>", "<think>", "</think>"]),
    ("<tool_call> <function=", ["<tool_call>", "</tool_call>"]),
    ("<tool_call> <arg_key>", ["<tool_call>", "<arg_key>", "</arg_key>", "<arg_value>", "</arg_value>"]),
    ("", ["[TOOL_CALLS]"]),
    ("", ["[TOOL_CALLS]", "[ARGS]", "[THINK]", "[/THINK]"]),
    ("<|tool_call|>", ["<|tool_call|>"]),
    ("```json", ["<｜tool▁calls▁begin｜>", "<｜tool▁call▁begin｜>", "<｜tool▁sep｜>", "<｜tool▁call▁end｜>"]),
    ("<｜tool▁call▁begin｜> <｜tool▁sep｜>", []),
    ("", ["<|tool_calls_section_begin|>", "<|tool_call_begin|>", "<|tool_call_argument_begin|>", "<|tool_call_end|>"]),
    ('"parameters"', ["<|python_tag|>"]),
    ("[func_name1(", []),
    ("<|tool_call_start|>", ["<|tool_call_start|>", "<|tool_call_end|>"]),
    ("<|START_ACTION|>", ["<|START_ACTION|>", "<|END_ACTION|>"]),
]  # fmt: skip


def codec_of(template: str, special: list[str]) -> TextCodec:
    tokenizer = byte_level_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": special})
    tokenizer.chat_template = template
    return TextCodec(tokenizer, "tags")


def compiler(codec: TextCodec) -> GrammarCompiler:
    return GrammarCompiler(codec, vocabulary=codec.for_grammars()[1], end_token_ids=[1])


@pytest.mark.parametrize(("template", "special"), WRITTEN, ids=range(len(WRITTEN)))
def test_whatever_is_allowed_is_calls_of_the_tools(template: str, special: list[str]) -> None:
    codec = codec_of(template, special)
    opening = "<think></think>[THINK][/THINK]<|START_THINKING|><|END_THINKING|>"  # nothing more to think
    source = codec.answers.calls_grammar(TOOLS, many=True, opening=opening)
    compiled = compiler(codec).compile("lark", source)
    named = []
    for seed in range(8):
        tokens = answer(compiled.matcher(), seed, vocabulary=codec.for_grammars()[1])
        stream = codec.stream(keep_tags=True)
        text = "".join(map(stream.push, tokens)) + stream.flush()
        found = read(codec.answers.parser(TOOLS, opening=opening), [text])
        assert found.whole == len(found.calls) >= 1 and not found.broken and not found.text and not found.reasoning
        for name, arguments in found.calls:
            jsonschema.validate(json.loads(arguments), SCHEMAS[name])
        named.append([name for name, _ in found.calls])
    assert {name for names in named for name in names} == set(SCHEMAS)
    assert {len(names) > 1 for names in named} == {True, False}


def allows(codec: TextCodec, source: str, text: str) -> bool:
    matcher = compiler(codec).compile("lark", source).matcher()
    for token in [*codec.encode(text), 1]:
        try:
            matcher.accept(token)
        except ValueError:
            return False
    return True


CALL = '<tool_call>\n{"name": "time", "arguments": {}}\n</tool_call>'


@pytest.mark.parametrize("special", [[], ["<think>", "</think>"]])
def test_reasoning_may_come_before_calls(special: list[str]) -> None:
    codec = codec_of("<tool_call> <think>", special)
    free = codec.answers.calls_grammar(TOOLS, many=False)
    for text, fits in [
        (CALL, True),
        (f"<think>\nHm, <b>.\n</think>\n\n{CALL}", True),
        (f"<think>{CALL}", False),
        (f"{CALL}\n{CALL}", False),
        ("I look.", False),
        (CALL.replace("time", "date"), False),
    ]:
        assert allows(codec, free, text) == fits, text
    begun = codec.answers.calls_grammar(TOOLS, many=True, opening="<|assistant|><think>\n")
    assert allows(codec, begun, f"Hm.\n</think>\n{CALL}\n{CALL}") and not allows(codec, begun, CALL)
    over = codec.answers.calls_grammar(TOOLS, many=False, opening="<think>\n\n</think>\n\n")
    assert allows(codec, over, CALL) and not allows(codec, over, f"<think></think>{CALL}")


def test_one_tool_of_several_can_be_asked_for() -> None:
    codec = codec_of("<tool_call>", [])
    source = codec.answers.calls_grammar(TOOLS[:1], many=False)
    assert not allows(codec, source, CALL)
    assert allows(codec, source, '<tool_call>\n{"name": "get_weather", "arguments": {"town": "Tarn"}}\n</tool_call>')


@pytest.mark.parametrize("special", [[], ["<tool_call>", "</parameter>"]])
def test_words_stand_between_tags_where_a_string_may_stand(special: list[str]) -> None:
    codec = codec_of("<tool_call> <function=", special)
    tool = {"name": "say", "parameters": {"properties": {"words": {"type": "string"}, "n": True}, "required": ["n"]}}
    source = codec.answers.calls_grammar([tool], many=False)
    say = "<tool_call>\n<function=say>\n{}<parameter=n>\n[1]\n</parameter>\n</function>\n</tool_call>"
    assert allows(codec, source, say.format('<parameter=words>\nIt\'s 1 "é".\n\n</parameter>\n'))
    assert allows(codec, source, say.format("")) and not allows(codec, source, say.replace("[1]", "no").format(""))


@pytest.mark.parametrize(("tag", "known"), [("<<", False), ("<tool_call>", True)])
def test_a_response_template_that_reads_no_known_form_is_refused(tag: str, known: bool) -> None:
    field = {"open": tag, "close": tag.replace("<t", "</t"), "content": "json", "transform": {"function": "{content}"}}
    tokenizer = byte_level_tokenizer()
    tokenizer.response_template = {"start_anchor": "<|assistant|>", "fields": {"tool_calls": field}}
    reader = AnswerReader(tokenizer)
    assert reader.name == "response_template"
    if known:
        assert "tool_call" in reader.calls_grammar(TOOLS, many=False)
        return
    with pytest.raises(TextRefused, match="how this model writes tool calls"):
        reader.calls_grammar(TOOLS, many=False)


FORMS = [each for each in vars(forms).values() if isinstance(each, Form)]


@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.name)
def test_every_form_says_how_calls_are_written(form: Form) -> None:
    assert form.writing is not None
