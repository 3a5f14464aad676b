"""The input of ``/v1/responses``, a text or items, as the messages of a chat."""

from __future__ import annotations

from typing import Any

from gateway.api.fields import Fields
from gateway.api.messages import MESSAGES_MAX, content_of, message_of
from gateway.errors import invalid

FOR_READERS = ("id", "status", "phase")  # what output items bear beside what they say


def read_input(fields: Fields) -> list[dict[str, Any]]:
    """Messages, those of ``instructions`` first. Raises ``HttpError``."""
    instructions = fields.string("instructions")
    messages: list[dict[str, Any]] = [{"role": "system", "content": instructions}] if instructions else []
    value = fields.take("input")
    if isinstance(value, str) and value:
        return [*messages, {"role": "user", "content": value}]
    if not isinstance(value, list) or not value:
        raise invalid("input", "must be a string or a list of items")
    if len(value) > MESSAGES_MAX:
        raise invalid("input", f"has more than {MESSAGES_MAX}")
    for index, each in enumerate(value):
        _add(messages, Fields(each, f"input[{index}]"))
    return messages


def _add(messages: list[dict[str, Any]], item: Fields) -> None:
    """One more item; what an assistant thinks, says and calls in a row is one message."""
    kind = item.string("type") or "message"
    item.harmless(*FOR_READERS)
    if kind == "message":
        said = message_of(item)
        if said["role"] == "assistant" and _still(messages, "content"):
            messages[-1]["content"] = said["content"]
        else:
            messages.append(said)
    elif kind == "reasoning":
        item.harmless("summary")
        item.only("encrypted_content", why="is not served")
        messages.append({"role": "assistant", "content": "", "reasoning_content": _reasoning(item)})
    elif kind == "function_call":
        call = {"name": item.required("name"), "arguments": item.string("arguments") or "{}"}
        if not _still(messages):
            messages.append({"role": "assistant", "content": ""})
        called = {"id": item.required("call_id"), "type": "function", "function": call}
        messages[-1].setdefault("tool_calls", []).append(called)
    elif kind == "function_call_output":
        call_id = item.required("call_id")
        messages.append({"role": "tool", "tool_call_id": call_id, "content": content_of(item, "output")})
    else:
        raise invalid(item.name("type"), "is not an item that is served here", "unsupported_parameter")
    item.end()


def _still(messages: list[dict[str, Any]], lacking: str = "") -> bool:
    """Whether the last message is an assistant's, to which more may be added."""
    if not messages or messages[-1]["role"] != "assistant":
        return False
    return not lacking or not (messages[-1].get(lacking) or messages[-1].get("tool_calls"))


def _reasoning(item: Fields) -> str:
    words = []
    for index, each in enumerate(item.items("content") or []):
        part = Fields(each, item.name(f"content[{index}]"))
        part.only("type", "reasoning_text", why="must be reasoning_text")
        words.append(part.string("text") or "")
        part.end()
    return "".join(words)
