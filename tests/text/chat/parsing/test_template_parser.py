"""Response templates of published tokenizers: what comes out is what transformers' own parser makes of it."""

from __future__ import annotations

import json
import time
from typing import Any

import pytest
from transformers.cli.serving.utils import _RESPONSE_TEMPLATE_FALLBACKS
from transformers.utils.chat_parsing import parse_response

from tests.text.chat.parsing.reading import TOOLS, Read, read, read_however_cut
from text.chat.parsing.template_parser import TemplateParser, load_template
from text.chat.parsing.xml_calls import schemas_of

TEMPLATES = {types[0]: template for types, template in _RESPONSE_TEMPLATE_FALLBACKS.items()}
CALL = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Paris"}}\n</tool_call>'
FUNCTION = (
    "<tool_call>\n<function=get_weather>\n<parameter=city>\nParis\n</parameter>\n<parameter=days>\n3\n</parameter>\n"
    "</function>\n</tool_call>"
)
GEMMA = '<|tool_call>call:get_weather{city:<|"|>Par"is<|"|>,days:3}<tool_call|>'
START = "<|im_start|>assistant\n"
ANSWERS = [
    ("qwen2", START, "Hello there."),
    ("qwen2", START, f"<think>\nHm.\n</think>\n\nI look.\n{CALL}\n{CALL}<|im_end|>"),
    (
        "qwen2",
        f"<|im_start|>user\n<think><|im_end|>\n{START}<think>\n",
        "Hm.\n</think>\n\nYes.<|im_end|>",
    ),
    (
        "qwen3_5",
        "<|im_start|>assistant\n<think>\n\n</think>\n\n",
        f"Look.\n{FUNCTION}\n{FUNCTION}<|im_end|>\n<|endoftext|>",
    ),
    ("qwen3_5", f"{START}<think>\n", f"Hm.\n</think>\n{FUNCTION}"),
    ("gemma4", "<|turn>model\n", f"<|channel>thought\nHm.<channel|>Look.{GEMMA}{GEMMA}<turn|>"),
    ("gemma4", "<|turn>model\n", "Hello.<turn|>"),
]


def parser(name: str, prompt: str) -> TemplateParser:
    return TemplateParser(load_template(TEMPLATES[name]), schemas_of(TOOLS), prompt)


@pytest.mark.parametrize("name, prompt, text", ANSWERS)
def test_what_transformers_reads(name: str, prompt: str, text: str) -> None:
    meant: dict[str, Any] = parse_response(text, TEMPLATES[name], prefix=prompt, tools=TOOLS)
    found = read_however_cut(lambda: parser(name, prompt), text)
    assert found.text == meant.get("content", "") and found.reasoning == meant.get("reasoning_content", "")
    calls = [call["function"] for call in meant.get("tool_calls", [])]
    assert [(name, json.loads(arguments)) for name, arguments in found.calls] == [
        (call["name"], call["arguments"]) for call in calls
    ]
    assert found.whole == len(calls) and not found.broken


@pytest.mark.parametrize(
    "name, text, left, whole",
    [
        ("qwen2", CALL.replace('"Paris"', "nonsense") + CALL, None, 1),
        ("qwen2", "<tool_call>no</tool_call> a", "<tool_call>no</tool_call> a", 0),
        ("qwen2", "a <tool_ca", "a <tool_ca", 0),
        ("qwen2", f"{CALL}</tool_call>", "</tool_call>", 1),
        ("qwen3_5", FUNCTION[:-30], FUNCTION[:-30], 0),
        ("qwen3_5", FUNCTION.replace("\n<parameter=days", " lost <parameter=days"), None, 0),
        ("gemma4", "<|tool_call>call:f{a:<tool_call|>", "<|tool_call>call:f{a:<tool_call|>", 0),
    ],
)
def test_what_is_no_call_is_text(name: str, text: str, left: str | None, whole: int) -> None:
    """transformers raises or drops these."""
    found = read_however_cut(lambda: parser(name, ""), text)
    assert found.whole == whole
    if left is None:
        assert ("onsense" if name == "qwen2" else "lost") in found.text
    else:
        assert found.text == left


def test_arguments_that_are_json_come_as_they_are_written() -> None:
    one = parser("qwen2", "")
    assert not one.push('<tool_call>{"name": "f", "arguments": {')[0].call.arguments
    assert [part.call.arguments for part in one.push('"a": ') if part.call] == ['"a": ']


def test_without_tools_calls_are_text() -> None:
    found = read_however_cut(lambda: TemplateParser(load_template(TEMPLATES["qwen2"]), None, ""), CALL)
    assert found == Read(CALL)


def test_a_begun_message_is_gone_on_with() -> None:
    prompt = "<|im_start|>assistant\n<think>\nHm, so"
    assert read_however_cut(lambda: parser("qwen2", prompt), " be it.\n</think>\nYes") == Read("Yes", " be it.")


def test_long_broken_answers_are_not_looked_through_again_and_again() -> None:
    for end in ("", "</function></tool_call>"):
        given = ["<tool_call>", "<function=f>"] * 4000 + [end]
        found = read(parser("qwen3_5", ""), given)
        assert found.text == "".join(given) and found.broken


def test_members_that_are_not_closed_are_not_looked_for_one_by_one() -> None:
    written = "<tool_call><function=get_weather>" + "<parameter=city>" * 20_000
    reading = parser("qwen3_5", START)
    began = time.thread_time()
    parts = [*reading.push(written), *reading.flush()]
    assert time.thread_time() - began < 10  # of its own time; minutes, if each looked for its end
    assert "".join(part.text for part in parts) == written and reading.broken
