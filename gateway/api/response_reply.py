"""The JSON of a response: one object, or the events of a stream."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from cairn import Delta, Result
from gateway.api.extension import report
from gateway.api.logprobs import chat_logprobs
from gateway.streams import event

PREFIXES = {"reasoning": "rs", "message": "msg", "function_call": "fc"}


@dataclass
class _Item:
    """An item of the output as it grows. ``call``: which call it is."""

    kind: str
    id: str
    place: int
    text: str = ""
    logprobs: list[dict[str, Any]] = field(default_factory=list)
    call: int = -1
    call_id: str = ""
    name: str = ""

    def shown(self, status: str) -> dict[str, Any]:
        """The item as the output has it."""
        head: dict[str, Any] = {"id": self.id, "type": self.kind, "status": status}
        if self.kind == "function_call":
            return {**head, "call_id": self.call_id, "name": self.name, "arguments": self.text}
        parts = [self.part()] if self.text or status != "in_progress" else []
        if self.kind == "reasoning":
            return {**head, "summary": [], "content": parts}
        return {**head, "role": "assistant", "content": parts}

    def part(self) -> dict[str, Any]:
        """Its one part."""
        if self.kind == "reasoning":
            return {"type": "reasoning_text", "text": self.text}
        return {"type": "output_text", "text": self.text, "annotations": [], "logprobs": self.logprobs}


class ResponseReply:
    """The answer to one request. ``echoed``: what a response repeats of it."""

    def __init__(self, request_id: str, echoed: dict[str, Any], *, logprobs: bool) -> None:
        self._request_id = request_id
        self._logprobs = logprobs
        self._head = {"id": f"resp_{request_id}", "object": "response", "created_at": int(time.time()), **echoed}
        self._items: list[_Item] = []
        self._open: _Item | None = None
        self._number = 0

    def whole(self, result: Result) -> dict[str, Any]:
        """A ``response``, of an answer that was not streamed."""
        tops, spelt = result.top_logprobs, result.token_bytes
        if result.reasoning:
            self._begin("reasoning").text = result.reasoning
        if result.text or not result.tool_calls:
            message = self._begin("message")
            message.text = result.text
            if self._logprobs:
                message.logprobs = chat_logprobs(result.token_ids, result.logprobs, tops, spelt)["content"]
        for call in result.tool_calls:
            item = self._begin("function_call")
            item.call_id, item.name, item.text = call.id, call.name, call.arguments
        return self._ended(result)

    def opening(self) -> list[str]:
        """The first events."""
        begun = {**self._head, "status": "in_progress", "output": [], "usage": None, **_NO_END}
        return [self._event(f"response.{name}", response=begun) for name in ("created", "in_progress")]

    def delta(self, delta: Delta) -> list[str]:
        """The events that a delta becomes."""
        events: list[str] = []
        if delta.reasoning:
            events += self._more("reasoning", delta.reasoning)
        if delta.text:
            told = []
            if self._logprobs and delta.token_ids:
                tops, spelt = delta.top_logprobs, delta.token_bytes
                told = chat_logprobs(delta.token_ids, delta.logprobs, tops, spelt)["content"]
            events += self._more("message", delta.text, told)
        for call in delta.tool_calls:
            if self._open is None or self._open.call != call.index:
                events += self._close()
                item = self._begin("function_call")
                item.call, item.call_id, item.name = call.index, call.id, call.name
                events += self._opened(item)
            if call.arguments:
                events += self._more("function_call", call.arguments)
        return events

    def ending(self, result: Result) -> list[str]:
        """The last events."""
        events = self._close()
        if not self._items:
            events += [*self._opened(self._begin("message")), *self._close()]
        ended = self._ended(result)
        return [*events, self._event(f"response.{ended['status']}", response=ended)]

    def _begin(self, kind: str) -> _Item:
        place = len(self._items)
        item = self._open = _Item(kind, f"{PREFIXES[kind]}_{self._request_id}_{place}", place)
        self._items.append(item)
        return item

    def _opened(self, item: _Item) -> list[str]:
        shown = item.shown("in_progress")
        events = [self._event("response.output_item.added", output_index=item.place, item=shown)]
        if item.kind != "function_call":
            events.append(self._of(item, "response.content_part.added", {"content_index": 0, "part": item.part()}))
        return events

    def _more(self, kind: str, words: str, logprobs: Sequence[dict[str, Any]] = ()) -> list[str]:
        events: list[str] = []
        item = self._open
        if item is None or item.kind != kind:
            events = self._close()
            item = self._begin(kind)
            events += self._opened(item)
        item.text += words
        item.logprobs += logprobs
        if kind == "function_call":
            return [*events, self._of(item, "response.function_call_arguments.delta", {"delta": words})]
        if kind == "reasoning":
            return [*events, self._of(item, "response.reasoning_text.delta", {"content_index": 0, "delta": words})]
        told = {"content_index": 0, "delta": words, "logprobs": list(logprobs)}
        return [*events, self._of(item, "response.output_text.delta", told)]

    def _close(self) -> list[str]:
        """The events that end the open item, if there is one."""
        item, self._open = self._open, None
        if item is None:
            return []
        told: dict[str, Any]
        if item.kind == "function_call":
            told = {"arguments": item.text, "name": item.name}
            events = [self._of(item, "response.function_call_arguments.done", told)]
        elif item.kind == "reasoning":
            events = [self._of(item, "response.reasoning_text.done", {"content_index": 0, "text": item.text})]
        else:
            told = {"content_index": 0, "text": item.text, "logprobs": item.logprobs}
            events = [self._of(item, "response.output_text.done", told)]
        if item.kind != "function_call":
            events.append(self._of(item, "response.content_part.done", {"content_index": 0, "part": item.part()}))
        done = item.shown("completed")
        return [*events, self._event("response.output_item.done", output_index=item.place, item=done)]

    def _ended(self, result: Result) -> dict[str, Any]:
        cut = result.finish_reason not in ("stop", "tool_calls")
        status = "incomplete" if cut else "completed"
        used = result.usage
        counted = {
            "input_tokens": used.prompt_tokens,
            "input_tokens_details": {"cached_tokens": used.cached_tokens, "cache_write_tokens": 0},
            "output_tokens": used.completion_tokens,
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": used.prompt_tokens + used.completion_tokens,
        }
        end = {"incomplete_details": {"reason": "max_output_tokens"} if cut else None, "error": None}
        output = [item.shown(status if item is self._items[-1] else "completed") for item in self._items]
        return {**self._head, "status": status, "output": output, "usage": counted, **end, "cairn": report(result)}

    def _of(self, item: _Item, kind: str, values: dict[str, Any]) -> str:
        return self._event(kind, item_id=item.id, output_index=item.place, **values)

    def _event(self, kind: str, **values: Any) -> str:
        told = {"type": kind, "sequence_number": self._number, **values}
        self._number += 1
        return event(told, kind)


_NO_END = {"incomplete_details": None, "error": None}
