"""The JSON of a chat's answers: one object, or chunks of a stream."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from cairn import Delta, Result, ToolCall
from cairn.client.answers import ToolCallDelta
from gateway.api.extension import report
from gateway.api.logprobs import chat_logprobs
from gateway.api.streaming import Streaming
from gateway.api.usage import usage
from gateway.streams import event


def tool_call(call: ToolCall) -> dict[str, Any]:
    """A whole call as a message has it."""
    return {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}


def _more_of(call: ToolCallDelta) -> dict[str, Any]:
    """A delta of a call: who it is with the first, arguments with all."""
    function: dict[str, Any] = {"arguments": call.arguments}
    if call.name:
        function["name"] = call.name
    begins = {"id": call.id, "type": "function"} if call.id else {}
    return {"index": call.index, **begins, "function": function}


class ChatReply:
    """The answers to one request. ``logprobs``: they were asked for."""

    def __init__(self, request_id: str, model: str, streaming: Streaming, logprobs: bool) -> None:
        self._streaming = streaming
        self._logprobs = logprobs
        self._head = {"id": f"chatcmpl-{request_id}", "created": int(time.time()), "model": model}
        self._begun: set[int] = set()

    def whole(self, results: Sequence[Result]) -> dict[str, Any]:
        """A ``chat.completion``."""
        choices = [self._choice(result) for result in results]
        head = {**self._head, "object": "chat.completion"}
        return {**head, "choices": choices, "usage": usage(results), "cairn": report(results[0])}

    def _choice(self, result: Result) -> dict[str, Any]:
        told = None
        if self._logprobs:
            told = chat_logprobs(result.token_ids, result.logprobs, result.top_logprobs, result.token_bytes)
        message: dict[str, Any] = {"role": "assistant", "content": result.text, "refusal": None}
        if result.reasoning:
            message["reasoning_content"] = result.reasoning
        if result.tool_calls:
            message["content"] = result.text or None
            message["tool_calls"] = [tool_call(call) for call in result.tool_calls]
        return {"index": result.index, "message": message, "logprobs": told, "finish_reason": result.finish_reason}

    def delta(self, delta: Delta) -> list[str]:
        """The chunks that a delta becomes; before the first of an answer one that says whose it is."""
        chunks = self._opening(delta.index)
        told = None
        if self._logprobs and delta.token_ids:
            told = chat_logprobs(delta.token_ids, delta.logprobs, delta.top_logprobs, delta.token_bytes)
        brought: dict[str, Any] = {}
        if delta.reasoning:
            brought["reasoning_content"] = delta.reasoning
        if delta.text or (told is not None and not delta.reasoning and not delta.tool_calls):
            brought["content"] = delta.text
        if delta.tool_calls:
            brought["tool_calls"] = [_more_of(call) for call in delta.tool_calls]
        if brought or told is not None:
            chunks.append(self._chunk(delta.index, brought, logprobs=told))
        return chunks

    def ending(self, results: Sequence[Result]) -> list[str]:
        """The last chunks; the very last has the report."""
        chunks: list[str] = []
        for result in results:
            chunks += self._opening(result.index)
            last = None if self._streaming.usage or result is not results[-1] else {"cairn": report(results[0])}
            chunks.append(self._chunk(result.index, {}, result.finish_reason, more=last))
        if self._streaming.usage:
            counted = {"choices": [], "usage": usage(results), "cairn": report(results[0])}
            chunks.append(event({**self._head, "object": "chat.completion.chunk", **counted}))
        return chunks

    def _opening(self, index: int) -> list[str]:
        if index in self._begun:
            return []
        self._begun.add(index)
        return [self._chunk(index, {"role": "assistant", "content": ""})]

    def _chunk(
        self,
        index: int,
        delta: dict[str, Any],
        finish: str | None = None,
        *,
        logprobs: dict[str, Any] | None = None,
        more: dict[str, Any] | None = None,
    ) -> str:
        choice = {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": finish}
        chunk = {**self._head, "object": "chat.completion.chunk", "choices": [choice], **(more or {})}
        if self._streaming.usage:
            chunk["usage"] = None
        return event(chunk)
