"""``POST /v1/chat/completions``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from starlette.responses import JSONResponse, Response

from cairn import AsyncGeneration, Result
from cairn.client.calls import ChatOptions, GenerateOptions
from gateway.api.asked import Asked
from gateway.api.chat_reply import ChatReply
from gateway.api.extension import Extension, can_keep, extension_of, read_chat_options, read_extension
from gateway.api.fields import Fields
from gateway.api.messages import read_messages, with_documents
from gateway.api.sampling import UINT32_MAX, sampling_options
from gateway.api.streaming import Streaming, read_streaming
from gateway.api.tools import only_one, read_grammar, read_response_format, read_tools
from gateway.errors import invalid
from gateway.streams import DONE, Events, EventStream, unless_gone

TOP_LOGPROBS_MAX = 20
NOT_SERVED = {
    "functions": "use tools",
    "function_call": "use tool_choice",
    "audio": "only text is served",
    "prediction": "is not served",
    "web_search_options": "is not served",
    "reasoning_effort": "is a matter of the model's template: give cairn.template_arguments",
    "verbosity": "is not served",
    "moderation": "is not served",
    "prompt_cache_options": "is not served",
    "prompt_cache_retention": "is not served",
}


@dataclass
class ChatRequest:
    """What was asked for."""

    model: str
    messages: list[dict[str, Any]]
    extension: Extension
    chat: ChatOptions
    options: GenerateOptions
    streaming: Streaming


async def chat_completions(asked: Asked) -> Response:
    """A chat completion, whole or streamed."""
    request = read_chat(await asked.fields())
    await asked.gateway.served.check(asked.client, request.model)
    reply = ChatReply(asked.request_id, request.model, request.streaming, bool(request.options.get("logprobs")))
    generation = start(asked, request)
    if request.streaming.stream:
        return await EventStream.begin(asked.request.receive, _events(generation, reply))
    return JSONResponse(reply.whole(await unless_gone(asked.request.receive, finish(generation))))


def read_chat(fields: Fields) -> ChatRequest:
    """The request in a body's JSON. Raises ``HttpError``."""
    model, messages = fields.required("model"), read_messages(fields)
    given = extension_of(fields)
    extension = read_extension(given)
    chat: ChatOptions = {**read_chat_options(given), **read_tools(fields)}
    if (arguments := fields.mapping("chat_template_kwargs")) is not None:  # as others call it
        chat["template_arguments"] = {**(chat["template_arguments"] or {}), **arguments}
    grammar = only_one(read_response_format(fields, "response_format"), read_grammar(given))
    given.end()
    options: GenerateOptions = {**sampling_options(fields), **extension.options, "grammar": grammar}
    short, long = fields.integer("max_tokens", 1, UINT32_MAX), fields.integer("max_completion_tokens", 1, UINT32_MAX)
    if short is not None and long is not None and short != long:
        raise invalid("max_tokens", "differs from max_completion_tokens; give one of them")
    if (most := long if short is None else short) is not None:
        options["max_tokens"] = most
    # A turn that is kept is what the next request of a conversation goes on from.
    options.setdefault("keep", can_keep(options))
    options["logprobs"] = bool(fields.boolean("logprobs"))
    options["top_logprobs"] = fields.integer("top_logprobs", 0, TOP_LOGPROBS_MAX) or 0
    if options["top_logprobs"] and not options["logprobs"]:
        raise invalid("top_logprobs", "needs logprobs: true")
    streaming = read_streaming(fields)
    fields.only("store", False, why="nothing is stored; leave it out")
    fields.only("service_tier", "auto", "default", why="there is one tier; leave it out")
    fields.only("modalities", ["text"], why="only text is served")
    for name, why in NOT_SERVED.items():
        fields.only(name, why=why)
    fields.end()
    return ChatRequest(model, messages, extension, chat, options, streaming)


def start(asked: Asked, request: ChatRequest) -> AsyncGeneration:
    """The request on its way to a decode service."""
    request.options["request_id"] = asked.new_id()
    messages = with_documents(request.messages, request.extension.documents)
    return asked.client.chat(messages, **request.chat, **request.options)


async def finish(generation: AsyncGeneration) -> Sequence[Result]:
    """All answers of a generation; it is cancelled if this is."""
    async with generation:
        await generation.finish()
        return generation.results


async def _events(generation: AsyncGeneration, reply: ChatReply) -> Events:
    async with generation:
        async for delta in generation:
            for words in reply.delta(delta):
                yield words
        for words in reply.ending(generation.results):
            yield words
        yield DONE
