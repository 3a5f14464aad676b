"""``POST /v1/chat/completions``."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

from starlette.responses import JSONResponse, Response

from cairn import AsyncGeneration, Delta, Result
from cairn.client.calls import GenerateOptions
from gateway.api.asked import Asked
from gateway.api.extension import Extension, read_extension, report
from gateway.api.fields import Fields
from gateway.api.messages import read_messages, with_documents
from gateway.api.sampling import UINT32_MAX, sampling_options
from gateway.api.streaming import Streaming, read_streaming
from gateway.api.usage import usage
from gateway.errors import invalid
from gateway.streams import DONE, Events, EventStream, event, unless_gone

REFUSED = {
    "functions": "use tools",
    "function_call": "use tool_choice",
    "audio": "only text is served",
    "prediction": "is not served",
    "web_search_options": "is not served",
    "reasoning_effort": "is a matter of the model's template",
    "verbosity": "is not served",
}


@dataclass
class ChatRequest:
    """What was asked for."""

    model: str
    messages: list[dict[str, Any]]
    extension: Extension
    options: GenerateOptions
    streaming: Streaming


async def chat_completions(asked: Asked) -> Response:
    """A chat completion, whole or streamed."""
    request = read_chat(await asked.fields())
    await asked.gateway.served.check(asked.client, request.model)
    reply = ChatReply(asked.request_id, request)
    generation = _start(asked, request)
    if request.streaming.stream:
        return await EventStream.begin(asked.request.receive, _events(generation, reply))
    result = await unless_gone(asked.request.receive, _finish(generation))
    return JSONResponse(reply.whole([result]))


def read_chat(fields: Fields) -> ChatRequest:
    """The request in a body's JSON. Raises ``HttpError``."""
    model, messages = fields.required("model"), read_messages(fields)
    extension = read_extension(fields)
    options: GenerateOptions = {**sampling_options(fields), **extension.options}
    short, long = fields.integer("max_tokens", 1, UINT32_MAX), fields.integer("max_completion_tokens", 1, UINT32_MAX)
    if short is not None and long is not None and short != long:
        raise invalid("max_tokens", "differs from max_completion_tokens; give one of them")
    if (most := long if short is None else short) is not None:
        options["max_tokens"] = most
    # A turn that is kept is what the next request of a conversation goes on from.
    options.setdefault("keep", options["reuse"] == "exact" and options["cache"] == "shared")
    streaming = read_streaming(fields)
    fields.only("n", 1, why="one answer a request")
    fields.only("logprobs", False, why="is not served yet")
    fields.only("top_logprobs", 0, why="is not served yet")
    fields.only("response_format", {"type": "text"}, why="is not served yet")
    fields.only("tools", [], why="is not served yet")
    fields.only("tool_choice", "none", "auto", why="is not served yet")
    fields.harmless("parallel_tool_calls")
    fields.only("store", False, why="nothing is stored; leave it out")
    fields.only("service_tier", "auto", "default", why="there is one tier")
    fields.only("modalities", ["text"], why="only text is served")
    for name, why in REFUSED.items():
        fields.only(name, why=why)
    fields.end()
    return ChatRequest(model, messages, extension, options, streaming)


def _start(asked: Asked, request: ChatRequest) -> AsyncGeneration:
    request.options["request_id"] = asked.new_id()
    messages = with_documents(request.messages, request.extension.documents)
    return asked.client.chat(messages, **request.extension.chat, **request.options)


async def _finish(generation: AsyncGeneration) -> Result:
    async with generation:
        return await generation.finish()


async def _events(generation: AsyncGeneration, reply: ChatReply) -> Events:
    async with generation:
        begun = False
        async for delta in generation:
            if not begun:  # not before the service has begun: until then an error has a status
                begun = True
                yield reply.opening()
            if delta.text:
                yield reply.delta(delta)
        if not begun:
            yield reply.opening()
        for words in reply.ending([generation.result]):
            yield words
        yield DONE


class ChatReply:
    """The JSON of one request's answer."""

    def __init__(self, request_id: str, request: ChatRequest) -> None:
        self._request = request
        self._head = {"id": f"chatcmpl-{request_id}", "created": int(time.time()), "model": request.model}

    def whole(self, results: list[Result]) -> dict[str, Any]:
        """A ``chat.completion``."""
        choices = [
            {
                "index": index,
                "message": {"role": "assistant", "content": result.text, "refusal": None},
                "logprobs": None,
                "finish_reason": result.finish_reason,
            }
            for index, result in enumerate(results)
        ]
        head = {**self._head, "object": "chat.completion"}
        return {**head, "choices": choices, "usage": usage(results), "cairn": report(results[0])}

    def opening(self) -> str:
        return self._chunk({"role": "assistant", "content": ""})

    def delta(self, delta: Delta) -> str:
        return self._chunk({"content": delta.text})

    def ending(self, results: list[Result]) -> list[str]:
        """The last chunks; the very last has the report."""
        last = {"cairn": report(results[0])}
        if not self._request.streaming.usage:
            return [self._chunk({}, results[0].finish_reason, last)]
        counted = {**self._head, "object": "chat.completion.chunk", "choices": [], "usage": usage(results), **last}
        return [self._chunk({}, results[0].finish_reason), event(counted)]

    def _chunk(self, delta: dict[str, Any], finish: str | None = None, more: dict[str, Any] | None = None) -> str:
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish}
        chunk = {**self._head, "object": "chat.completion.chunk", "choices": [choice], **(more or {})}
        if self._request.streaming.usage:
            chunk["usage"] = None
        return event(chunk)
