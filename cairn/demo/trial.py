"""One exercise of the demonstration: asked warm, again, and past every cache, then judged."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from cairn.client.answers import Result
from cairn.client.async_client import AsyncClient
from cairn.client.chunks import Chunk, ChunkRef
from cairn.client.prompt import Text
from cairn.demo.examples import Examples, Exercise

if TYPE_CHECKING:
    from cairn.demo.oracle import PlainModel

ANSWER_TOKENS_MAX = 48

Show = Callable[[str], None]


@dataclass(frozen=True)
class Answered:
    """A result and the seconds until its first token reached this process."""

    result: Result
    first_token_s: float


@dataclass(frozen=True)
class Verdict:
    """What one exercise showed. ``compared`` is ``"identical"`` or ``"DIFFERS"``, "" where plain generation is not
    what the mode promises; ``problems`` is empty if all is well."""

    exercise: Exercise
    result: Result
    first_s: float
    warm_s: float
    cold_s: float
    compared: str
    problems: tuple[str, ...]


@dataclass(frozen=True)
class Registered:
    """The chunks of the examples."""

    system: Chunk
    documents: dict[str, Chunk]

    def compose(self, exercise: Exercise) -> list[ChunkRef | Text]:
        """An exercise's segments in its order, the question last."""
        documents = [self.documents[name] for name in exercise.order]
        return [self.system, *documents, Text(exercise.question.question, type="query", role="user")]


async def register(client: AsyncClient, examples: Examples) -> Registered:
    """Register the system prompt and the documents; each one's KV is computed on its own."""
    system = await client.prefill(examples.system, type="system_prompt", role="system", name="system")
    documents = {
        name: await client.prefill(text, role="document", name=name.removesuffix(".txt"))
        for name, text in examples.documents.items()
    }
    return Registered(system, documents)


async def try_exercise(
    client: AsyncClient, registered: Registered, examples: Examples, exercise: Exercise, oracle: PlainModel, show: Show
) -> Verdict:
    """Ask three times and compare; the first answer is shown while it streams."""
    segments = registered.compose(exercise)
    first = await _ask(client, segments, exercise.reuse, "shared", show)
    warm = await _ask(client, segments, exercise.reuse, "shared")
    cold = await _ask(client, segments, exercise.reuse, "bypass")
    prompt = oracle.prompt(exercise.messages(examples))
    answers = [oracle.without_end(list(answered.result.token_ids)) for answered in (first, warm, cold)]
    problems = _complaints(exercise, first.result, len(prompt))
    compared = ""
    if exercise.reuse == "exact":
        plain = await asyncio.to_thread(oracle.answer, prompt, ANSWER_TOKENS_MAX)
        compared = "identical" if all(answer == plain for answer in answers) else "DIFFERS"
        problems += [] if compared == "identical" else ["the tokens differ from plain generation"]
    elif any(answer != answers[0] for answer in answers):
        problems.append("the three answers are not the same")
    return Verdict(
        exercise, first.result, first.first_token_s, warm.first_token_s, cold.first_token_s, compared, tuple(problems)
    )


def _complaints(exercise: Exercise, result: Result, prompt_tokens: int) -> list[str]:
    """What is wrong with a result by itself."""
    problems = []
    if result.text.strip() != exercise.question.answer:
        problems.append(f"expected {exercise.question.answer!r}")
    if result.usage.prompt_tokens != prompt_tokens:
        problems.append(f"the prompt has {prompt_tokens} tokens, the service counted {result.usage.prompt_tokens}")
    if result.usage.cached_tokens + result.usage.computed_tokens != prompt_tokens:
        problems.append("cached and computed tokens do not add up")
    query_tokens = result.reuse.segments[-1].tokens
    if exercise.reuse == "independent" and result.usage.computed_tokens != query_tokens:
        problems.append(f"{result.usage.computed_tokens - query_tokens} document tokens were computed again")
    return problems


async def _ask(
    client: AsyncClient, segments: list[ChunkRef | Text], reuse: str, cache: str, show: Show | None = None
) -> Answered:
    begin = time.perf_counter()
    first_token_s = 0.0
    async with client.generate(segments, reuse=reuse, cache=cache, max_tokens=ANSWER_TOKENS_MAX) as stream:
        async for delta in stream:
            if delta.token_ids and not first_token_s:
                first_token_s = time.perf_counter() - begin
            if show is not None:
                show(delta.text)
    return Answered(stream.result, first_token_s)
