"""``POST /v1/completions``."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass

from starlette.responses import JSONResponse, Response

from cairn import AsyncGeneration, Delta, Result
from cairn.client.calls import GenerateOptions
from cairn.client.errors import CairnError
from gateway.api.asked import Asked
from gateway.api.completion_reply import CompletionReply, Echo
from gateway.api.extension import Extension, extension_of, read_extension
from gateway.api.fields import Fields
from gateway.api.prompts import Prompt, document_segments, query, read_prompts
from gateway.api.sampling import UINT32_MAX, sampling_options
from gateway.api.streaming import Streaming, read_streaming
from gateway.api.tools import read_grammar
from gateway.errors import invalid
from gateway.streams import DONE, Events, EventStream, unless_gone

MAX_TOKENS = 16  # OpenAI's default for completions
LOGPROBS_MAX = 20
DELTAS_WAITING_MAX = 64  # of all prompts, until they are sent on


@dataclass
class CompletionRequest:
    """What was asked for. ``echo``: what stands before the answers of each prompt."""

    model: str
    prompts: Sequence[Prompt]
    echo: Sequence[Echo]
    extension: Extension
    options: GenerateOptions
    streaming: Streaming


async def completions(asked: Asked) -> Response:
    """Completions of one prompt or several, whole or streamed."""
    request = read_completion(await asked.fields())
    await asked.gateway.served.check(asked.client, request.model)
    reply = CompletionReply(
        *(asked.request_id, request.model, request.streaming),
        n=request.options["n"],
        echoes=request.echo,
        logprobs=request.options["logprobs"],
    )
    documents = await document_segments(request.extension.documents, asked.client)
    generations = []
    for prompt in request.prompts:
        options: GenerateOptions = {**request.options, "request_id": asked.new_id()}
        generations.append(asked.client.generate([*documents, query(prompt)], **options))
    if request.streaming.stream:
        return await EventStream.begin(asked.request.receive, _events(generations, reply))
    return JSONResponse(reply.whole(await unless_gone(asked.request.receive, _finish(generations))))


def read_completion(fields: Fields) -> CompletionRequest:
    """The request in a body's JSON. Raises ``HttpError``."""
    model, prompts = fields.required("model"), read_prompts(fields)
    given = extension_of(fields)
    extension, grammar = read_extension(given), read_grammar(given)
    given.end()
    options: GenerateOptions = {**sampling_options(fields), **extension.options, "grammar": grammar}
    most = fields.integer("max_tokens", 0, UINT32_MAX)
    options["max_tokens"] = MAX_TOKENS if most is None else most
    top = fields.integer("logprobs", 0, LOGPROBS_MAX)
    options["logprobs"], options["top_logprobs"] = top is not None, top or 0
    streaming = read_streaming(fields)
    echo = _echoes(fields, prompts, options)
    if any(each.scored for each in echo) and (streaming.stream or extension.documents):
        raise invalid("echo", "of token ids, or with logprobs, is served without stream and cairn.documents")
    fields.only("best_of", 1, why="is not served; ask for n answers")
    fields.only("suffix", "", why="is not served")
    fields.end()
    return CompletionRequest(model, prompts, echo, extension, options, streaming)


def _echoes(fields: Fields, prompts: Sequence[Prompt], options: GenerateOptions) -> list[Echo]:
    """What ``echo`` means to each prompt; where its tokens must be known they are asked for. Raises ``HttpError``."""
    echoed, alone = bool(fields.boolean("echo")), options["max_tokens"] == 0
    if alone and not echoed:
        raise invalid("max_tokens", "must be at least 1, unless the prompt is echoed")
    if not echoed:
        return [Echo()] * len(prompts)
    if alone:
        options["max_tokens"] = 1  # which is left out of the answer
    scored = bool(options["logprobs"]) or not all(isinstance(prompt, str) for prompt in prompts)
    if scored:
        options["prompt_logprobs"] = options["top_logprobs"]
    return [Echo(prompt if isinstance(prompt, str) else "", scored, alone) for prompt in prompts]


async def _finish(generations: Sequence[AsyncGeneration]) -> list[list[Result]]:
    try:
        await asyncio.gather(*(generation.finish() for generation in generations))
        return [generation.results for generation in generations]
    finally:
        for generation in generations:
            await generation.aclose()


async def _events(generations: Sequence[AsyncGeneration], reply: CompletionReply) -> Events:
    begun = False
    async with aclosing(_merged(generations)) as deltas:
        async for prompt, delta in deltas:
            for words in [] if begun else reply.opening():
                yield words
            begun = True
            for words in reply.delta(prompt, delta):
                yield words
    for words in reply.ending([generation.results for generation in generations]):
        yield words
    yield DONE


async def _merged(generations: Sequence[AsyncGeneration]) -> AsyncGenerator[tuple[int, Delta], None]:
    """Deltas of all as they come, with the place of the generation that each belongs to. The first error ends all."""
    arrived: asyncio.Queue[tuple[int, Delta] | CairnError | None] = asyncio.Queue(DELTAS_WAITING_MAX)

    async def read(place: int, generation: AsyncGeneration) -> None:
        try:
            async for delta in generation:
                await arrived.put((place, delta))
        except CairnError as error:
            await arrived.put(error)
        else:
            await arrived.put(None)

    readers = [asyncio.create_task(read(place, generation)) for place, generation in enumerate(generations)]
    try:
        unfinished = len(readers)
        while unfinished:
            found = await arrived.get()
            if isinstance(found, CairnError):
                raise found
            if found is None:
                unfinished -= 1
            else:
                yield found
    finally:
        for reader, generation in zip(readers, generations, strict=True):
            reader.cancel()
            await generation.aclose()
        await asyncio.gather(*readers, return_exceptions=True)
