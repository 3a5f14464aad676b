"""Chats of the protos as plain values: what is refused names its field."""

from __future__ import annotations

import time
from typing import Any

import pytest

from decode_service.api.chat_in import MESSAGES_MAX, PARTS_MAX, TOOL_CALLS_MAX, TOOLS_MAX, chat_in, check_either
from protos import decode_pb2
from serving.errors import InvalidRequest
from serving.rpc.field_bounds import ContentBudget
from text.chat.message import ChunkPart, ToolCall

PART, MESSAGE, CALL = decode_pb2.ContentPart, decode_pb2.ChatMessage, decode_pb2.ToolCall
ONE = [MESSAGE(role="user", content=[PART(text="a")])]
DEEP = '{"a":' + "[" * 70 + "]" * 70 + "}"


def read(**fields: Any) -> Any:
    return chat_in(decode_pb2.Chat(**{"messages": ONE, **fields}), ContentBudget(1024))


def test_what_stands_in_a_chat() -> None:
    call = CALL(id="1", name="f", arguments='{"a": "[[[{{"}')
    answer = MESSAGE(role="assistant", reasoning="Well.", tool_calls=[call], content=[PART(chunk_id="e" * 64)])
    chat = read(messages=[*ONE, answer], tools=['{"type": "function"}'], template_arguments='{"x": [1]}')
    assert chat.messages[0].parts == ("a",) and chat.messages[1].parts == (ChunkPart("e" * 64),)
    assert chat.messages[1].tool_calls == (ToolCall("1", "f", '{"a": "[[[{{"}'),)
    assert (chat.tools, chat.arguments) == (({"type": "function"},), {"x": [1]})
    assert read(messages=[MESSAGE(role="user", content=[PART(chunk_name="n")])]).messages[0].parts[0].name == "n"


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"messages": []}, "chat.messages: at least one"),
        ({"messages": [MESSAGE(content=[PART(text="a")])]}, "chat.messages: at least one with a role"),
        ({"messages": ONE * (MESSAGES_MAX + 1)}, "chat.messages: 1025"),
        ({"messages": [MESSAGE(role="user", content=[PART(text="")] * (PARTS_MAX + 1))]}, "parts are more"),
        ({"messages": [MESSAGE(role="u" * 300)]}, r"chat.messages\[0\].role"),
        ({"messages": [*ONE, MESSAGE(content=[PART(text="")])]}, r"chat.messages\[1\].role: is empty"),
        ({"messages": [MESSAGE(role="user", content=[PART()])]}, r"chat.messages\[0\].content\[0\]: give one"),
        ({"messages": [MESSAGE(role="user", content=[PART(chunk_id="")])]}, r"chat.messages\[0\].content\[0\]: give"),
        ({"messages": [MESSAGE(role="user", content=[PART(chunk_id="f" * 200)])]}, r"content\[0\].chunk_id"),
        ({"messages": [MESSAGE(role="user", content=[PART(text="x" * 99999)])]}, r"messages\[0\].content\[0\].text"),
        ({"messages": [MESSAGE(role="user", reasoning="x" * 99999)]}, r"messages\[0\].reasoning"),
        ({"messages": [MESSAGE(role="a", tool_calls=[CALL(name="f")] * (TOOL_CALLS_MAX + 1))]}, "tool_calls: 129"),
        ({"messages": [MESSAGE(role="a", tool_calls=[CALL(arguments="{}")])]}, r"tool_calls\[0\].name: is empty"),
        ({"messages": [MESSAGE(role="a", tool_calls=[CALL(name="f", arguments="[1]")])]}, r"arguments: is a JSON list"),
        ({"messages": [MESSAGE(role="a", tool_calls=[CALL(name="f", arguments="{")])]}, r"arguments: is no JSON"),
        ({"tools": ["{}"] * (TOOLS_MAX + 1)}, "chat.tools: 129"),
        ({"tools": ["3"]}, r"chat.tools\[0\]: is a JSON int"),
        ({"tools": ['{"a": NaN}']}, r"chat.tools\[0\]: is no JSON \(NaN"),
        ({"tools": ['{"a": "\\ud800"}']}, r"chat.tools\[0\]: is no JSON .*surrogates"),
        ({"tools": [DEEP]}, r"chat.tools\[0\]: is nested deeper"),
        ({"template_arguments": '{"messages": []}'}, "'messages' is set by the service"),
        ({"template_arguments": '{"chat_template": "x"}'}, "'chat_template' is set by the service"),
        ({"continue_last_message": True}, r"chat.messages\[0\]: only an assistant's"),
    ],
)
def test_what_is_refused(fields: dict[str, Any], says: str) -> None:
    with pytest.raises(InvalidRequest, match=says):
        read(**fields)


def test_a_request_is_of_segments_or_a_chat() -> None:
    chat = decode_pb2.Chat(messages=ONE)
    with pytest.raises(InvalidRequest, match=r"^chat: "):
        check_either(decode_pb2.GenerateRequest(chat=chat, segments=[decode_pb2.Segment(text="a")]))
    check_either(decode_pb2.GenerateRequest(chat=chat))


def test_a_text_of_quotes_that_do_not_end_is_looked_at_once() -> None:
    began = time.thread_time()
    for text in ('"' + '\\"' * 50_000, '"' + '\\"' * 50_000 + "\\"):
        with pytest.raises(InvalidRequest, match=r"chat.tools\[0\]: is no JSON"):
            chat_in(decode_pb2.Chat(messages=ONE, tools=[text]), ContentBudget(1 << 20))
    assert time.thread_time() - began < 10  # of its own time; minutes, if each quote is looked at to the end
