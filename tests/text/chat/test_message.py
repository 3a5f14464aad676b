"""Messages as templates and digests see them."""

from __future__ import annotations

from text.chat.message import ChunkPart, Message, ToolCall, template_messages, template_tools


def test_what_a_template_is_given() -> None:
    call = ToolCall("c1", "weather", '{"town": "Tarn"}')
    message = Message("assistant", ("a", ChunkPart("f" * 64, mark="MARK"), "b"), "Well.", (call,), name="n")
    assert template_messages([message]) == [
        {
            "role": "assistant",
            "content": "aMARKb",
            "reasoning_content": "Well.",
            "thinking": "Well.",
            "tool_calls": [
                {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": {"town": "Tarn"}}}
            ],
            "name": "n",
        }
    ]
    assert template_messages([Message("user", ("a",))], in_parts=True) == [
        {"role": "user", "content": [{"type": "text", "text": "a"}]}
    ]
    assert template_tools([]) is None and template_tools([{"a": 1}]) == [{"a": 1}]


def test_what_makes_messages_differ() -> None:
    def message(arguments: str = "{}", text: tuple[str, ...] = ("ab",), reasoning: str = "") -> tuple[bytes, ...]:
        return Message("assistant", text, reasoning, (ToolCall("c", "f", arguments),)).fields

    assert message('{"a":1, "b":[2]}') == message('{"b": [2], "a": 1}')
    assert message(text=("a", "b")) == message()
    assert len({message(), message('{"a": 1}'), message(text=("abc",)), message(reasoning="x")}) == 4
