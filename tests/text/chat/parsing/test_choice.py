"""Answers as published templates write them into a chat are read as what they were written from."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.text.chat.parsing.reading import TOOLS, read_however_cut
from tests.text.chat_templates import SPECIAL, tokenizer
from tests.tokenizer_for_tests import byte_level_tokenizer
from text.chat.parsing.choice import AnswerReader
from text.codec import TextCodec

USER = {"role": "user", "content": "What weather?"}
CALLS = [("get_weather", {"city": "Paris", "days": 3}), ("time", {})]
# How many calls the template writes into one message; whether it writes reasoning; whether arguments are text.
WRITES = {
    "deepseekv3": (2, False, True),
    "glm4moe": (2, True, False),
    "lfm2_v2": (2, False, False),
    "llama3_1": (1, False, False),
    "nemotron_3_nano": (2, True, False),
    "qwen2_5": (2, False, False),
    "qwen3": (2, True, False),
    "qwen3_5_think": (2, True, False),
    "qwen3_instruct_2507": (2, False, False),
}


@pytest.mark.parametrize("name", sorted(WRITES))
def test_what_a_template_writes_is_read(name: str) -> None:
    count, thinks, as_text = WRITES[name]
    model = byte_level_tokenizer()
    model.add_special_tokens({"additional_special_tokens": SPECIAL[name].split()})
    model.chat_template = tokenizer(name).chat_template
    calls = [
        {
            "id": f"call{number:05}",
            "type": "function",
            "function": {"name": called, "arguments": json.dumps(arguments) if as_text else arguments},
        }
        for number, (called, arguments) in enumerate(CALLS[:count])
    ]
    words = "" if count == 1 or as_text else "I look."
    answer: dict[str, Any] = {"role": "assistant", "content": words, "tool_calls": calls}
    if thinks:
        answer["reasoning_content"] = "Hm, well."

    def rendered(messages: list[Any], **more: bool) -> str:
        return str(model.apply_chat_template(messages, tools=TOOLS, tokenize=False, **more))

    asked, whole = rendered([USER], add_generation_prompt=True), rendered([USER, answer])
    opens = whole.startswith(asked)
    there = len(asked) if opens else len(rendered([USER]))
    codec = TextCodec(model, name)
    stream = codec.stream(keep_tags=True)
    text = "".join(map(stream.push, codec.encode(whole[there:]))) + stream.flush()
    opening = asked[len(rendered([USER])) :] if opens else ""
    found = read_however_cut(lambda: codec.answers.parser(TOOLS, opening=opening), text.rstrip("\n"))
    assert [(called, json.loads(arguments)) for called, arguments in found.calls] == CALLS[:count]
    assert (found.text, found.reasoning, found.broken) == (words, "Hm, well." if thinks else "", False)


def test_a_model_without_a_tokenizer_has_a_reader() -> None:
    assert AnswerReader(None).name == "hermes" and not AnswerReader(None).parser(TOOLS).push("")


def test_a_response_template_comes_first_if_it_is_one() -> None:
    model = byte_level_tokenizer()
    model.response_template = {"fields": {}}
    assert AnswerReader(model).name == "hermes"
    model.response_template = {"start_anchor": "<|assistant|>", "fields": {"content": {"close": "<end>"}}}
    codec = TextCodec(model, "own")
    assert codec.answers.name == "response_template" and "<end>" in codec.answers.words()
    found = read_however_cut(lambda: codec.answers.parser(opening="<|assistant|>"), "Yes.<end>")
    assert found.text == "Yes."
