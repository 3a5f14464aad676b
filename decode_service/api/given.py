"""What a caller was given of an answer: its tokens, and the message that they make."""

from __future__ import annotations

from decode_service.prompt.chat_prompt import Said
from protos import decode_pb2
from text.chat.message import ToolCall


class Given:
    """What the caller is given of an answer, as it goes out."""

    def __init__(self) -> None:
        self.token_ids: list[int] = []
        self._text: list[str] = []
        self._reasoning: list[str] = []
        self._calls: dict[int, list[str]] = {}  # by their place: id, name, and the words of their arguments

    def add(self, delta: decode_pb2.Delta) -> None:
        self.token_ids += delta.token_ids
        self._text.append(delta.text)
        self._reasoning.append(delta.reasoning)
        for call in delta.tool_calls:
            known = self._calls.setdefault(call.index, ["", ""])
            known[0], known[1] = known[0] or call.id, known[1] or call.name
            known.append(call.arguments)

    def said(self) -> Said:
        """It as a message."""
        calls = [ToolCall(call[0], call[1], "".join(call[2:]) or "{}") for _, call in sorted(self._calls.items())]
        return Said("".join(self._text), "".join(self._reasoning), tuple(calls))
