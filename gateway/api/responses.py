"""``POST /v1/responses``: what OpenAI's client needs to create a response, whole or streamed. Nothing is stored."""

from __future__ import annotations

from typing import Any

from starlette.responses import JSONResponse, Response

from cairn import AsyncGeneration
from cairn.client.calls import ChatOptions, GenerateOptions
from gateway.api.asked import Asked
from gateway.api.chat import TOP_LOGPROBS_MAX, ChatRequest, finish, start
from gateway.api.extension import can_keep, extension_of, read_chat_options, read_extension
from gateway.api.fields import Fields
from gateway.api.response_input import read_input
from gateway.api.response_reply import ResponseReply
from gateway.api.sampling import HARMLESS, UINT32_MAX, temperature_of
from gateway.api.streaming import Streaming
from gateway.api.tools import flat_tools, only_one, read_grammar, read_response_format
from gateway.errors import invalid
from gateway.streams import Events, EventStream, unless_gone

LOGPROBS = "message.output_text.logprobs"
NOT_SERVED = {
    "previous_response_id": "responses are not stored: send the whole conversation as input",
    "conversation": "conversations are not stored: send the whole conversation as input",
    "prompt": "templates of prompts are not stored",
    "max_tool_calls": "is not served",
    "reasoning": "is a matter of the model's template: give cairn.template_arguments",
    "context_management": "is not served",
    "moderation": "is not served",
    "prompt_cache_options": "is not served",
    "prompt_cache_retention": "is not served",
    "access_programs": "is not served",
    "background_options": "is not served",
    "image": "only text is served",
}


async def responses(asked: Asked) -> Response:
    """A response, whole or streamed."""
    request, echoed = read_response(await asked.fields())
    await asked.gateway.served.check(asked.client, request.model)
    reply = ResponseReply(asked.request_id, echoed, logprobs=bool(request.options.get("logprobs")))
    generation = start(asked, request)
    if request.streaming.stream:
        return await EventStream.begin(asked.request.receive, _events(generation, reply))
    (result,) = await unless_gone(asked.request.receive, finish(generation))
    return JSONResponse(reply.whole(result))


def read_response(fields: Fields) -> tuple[ChatRequest, dict[str, Any]]:
    """The request in a body's JSON, and what the response repeats of it. Raises ``HttpError``."""
    told = {name: fields.peek(name) for name in ("instructions", "max_output_tokens", "tool_choice", "tools", "text")}
    told["metadata"] = fields.peek("metadata") or {}
    model, messages = fields.required("model"), read_input(fields)
    text = fields.object("text") or Fields({}, "text")
    given = extension_of(fields)
    extension = read_extension(given)
    chat: ChatOptions = {**read_chat_options(given), **flat_tools(fields)}
    grammar = only_one(read_response_format(text, "format"), read_grammar(given))
    for each in (text, given):
        each.end()
    options: GenerateOptions = {**extension.options, "grammar": grammar, "temperature": temperature_of(fields)}
    options["top_p"] = fields.number("top_p", 0, 1)
    if (most := fields.integer("max_output_tokens", 1, UINT32_MAX)) is not None:
        options["max_tokens"] = most
    options.setdefault("keep", can_keep(options))
    options["logprobs"] = _logprobs(fields)
    options["top_logprobs"] = fields.integer("top_logprobs", 0, TOP_LOGPROBS_MAX) or 0
    if options["top_logprobs"] and not options["logprobs"]:
        raise invalid("top_logprobs", f"needs include: [{LOGPROBS!r}]")
    streaming = _streaming(fields)
    _refuse(fields)
    echoed = {
        **{"model": model, "instructions": told["instructions"], "metadata": told["metadata"]},
        **{"max_output_tokens": told["max_output_tokens"], "tools": told["tools"] or []},
        **{"tool_choice": told["tool_choice"] or "auto", "parallel_tool_calls": chat["parallel_tool_calls"]},
        **{"temperature": options["temperature"], "top_p": 1.0 if options["top_p"] is None else options["top_p"]},
        **{"text": told["text"] or {"format": {"type": "text"}}, "truncation": "disabled", "store": False},
        **{"previous_response_id": None, "reasoning": {"effort": None, "summary": None}},
    }
    return ChatRequest(model, messages, extension, chat, options, streaming), echoed


def _logprobs(fields: Fields) -> bool:
    include = fields.strings("include") or []
    if other := [each for each in include if each != LOGPROBS]:
        raise invalid("include", f"{other[0][:64]} is not served", "unsupported_parameter")
    return bool(include)


def _streaming(fields: Fields) -> Streaming:
    stream, options = bool(fields.boolean("stream")), fields.object("stream_options")
    if options is not None:
        options.only("include_obfuscation", False, why="is not served")
        options.end()
    return Streaming(stream, usage=True)


def _refuse(fields: Fields) -> None:
    """400 for what is left."""
    fields.only("store", False, why="nothing is stored; leave it out")
    fields.only("background", False, why="is not served")
    fields.only("truncation", "disabled", why="only disabled is served")
    fields.only("service_tier", "auto", "default", why="there is one tier; leave it out")
    for name, why in NOT_SERVED.items():
        fields.only(name, why=why)
    fields.harmless(*HARMLESS)
    fields.end()


async def _events(generation: AsyncGeneration, reply: ResponseReply) -> Events:
    begun = False
    async with generation:
        async for delta in generation:
            for words in [] if begun else reply.opening():
                yield words
            begun = True
            for words in reply.delta(delta):
                yield words
        for words in [] if begun else reply.opening():
            yield words
        for words in reply.ending(generation.result):
            yield words
