"""Messages of OpenAI's form, and of our own, as protobuf."""

from __future__ import annotations

from typing import Any

import pytest

import cairn
from cairn.client.chats import chat_field
from protos import decode_pb2

CALL = {"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}}


def test_dictionaries_and_messages_say_the_same() -> None:
    dictionaries: list[Any] = [
        {"role": "system", "content": "s"},
        {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "chunk", "id": "f"}, "b"], "name": "n"},
        {"role": "assistant", "content": None, "tool_calls": [CALL], "reasoning_content": "Well.", "refusal": None},
        {"role": "tool", "content": "r", "tool_call_id": "1"},
        {"role": "", "content": [{"type": "chunk", "name": "doc"}]},
    ]
    ours = [
        cairn.ChatMessage("system", "s"),
        cairn.ChatMessage("user", ["a", cairn.ChunkRef("f"), "b"], name="n"),
        cairn.ChatMessage("assistant", reasoning="Well.", tool_calls=[cairn.ToolCall("1", "f", '{"a": 1}')]),
        cairn.ChatMessage("tool", "r", tool_call_id="1"),
    ]
    given = chat_field(dictionaries, tools=[{"x": "é"}], template_arguments={"y": 1})
    assert list(given.messages)[:4] == list(chat_field(ours).messages)
    assert given.messages[4].content[0] == decode_pb2.ContentPart(chunk_name="doc")
    assert list(given.tools) == ['{"x": "é"}'] and given.template_arguments == '{"y": 1}' and given.parse
    plain: Any = {**CALL, "function": {"name": "f", "arguments": {"a": 1}}}
    assert chat_field([{"role": "assistant", "tool_calls": [plain]}]).messages[0].tool_calls[0].arguments == '{"a": 1}'


@pytest.mark.parametrize(
    ("messages", "says"),
    [
        ("hello", "messages: give a list"),
        ([], "messages: give a list"),
        (["hello"], r"messages\[0\]: must be a dictionary"),
        ([{"content": "x"}], r"messages\[0\]: must be a dictionary with a role"),
        ([{"role": "user", "content": "x", "colour": 1}], r"messages\[0\].colour"),
        ([{"role": "user", "audio": {"id": 1}}], r"messages\[0\].audio: is not supported"),
        ([{"role": "user", "content": [{"type": "image_url"}]}], r"messages\[0\].content\[0\]"),
        ([{"role": "user", "content": 3}], r"messages\[0\]"),
        ([{"role": 3}], r"messages\[0\]"),
        ([{"role": "assistant", "tool_calls": [{"id": "1"}]}], r"messages\[0\].tool_calls\[0\]: must have a function"),
    ],
)
def test_what_no_service_could_accept(messages: Any, says: str) -> None:
    with pytest.raises(cairn.InvalidRequest, match=says):
        chat_field(messages)


def test_tools_that_are_no_list() -> None:
    with pytest.raises(cairn.InvalidRequest, match="tools: give a list"):
        chat_field([{"role": "user"}], tools={"type": "function"})  # type: ignore[arg-type]
    with pytest.raises(cairn.InvalidRequest, match=r"tools\[0\]: cannot be written"):
        chat_field([{"role": "user"}], tools=[{"a": object()}])
