"""The JSON of a completion's answers: one object, or chunks of a stream."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from cairn import Delta, Result
from gateway.api.extension import report
from gateway.api.logprobs import completion_logprobs
from gateway.api.streaming import Streaming
from gateway.api.usage import usage
from gateway.streams import event


class CompletionReply:
    """The answers to a request's prompts, ``n`` to each. ``echoes``: what stands before each prompt's answers.

    ``logprobs``: they were asked for.
    """

    def __init__(
        self, request_id: str, model: str, streaming: Streaming, *, n: int, echoes: Sequence[str], logprobs: bool
    ) -> None:
        self._streaming = streaming
        self._n = n
        self._echoes = echoes
        self._logprobs = logprobs
        self._offsets = [len(echo) for echo in echoes for _ in range(n)]  # characters that are out
        self._head = {
            "id": f"cmpl-{request_id}",
            "object": "text_completion",
            "created": int(time.time()),
            "model": model,
        }

    def whole(self, results: Sequence[Sequence[Result]]) -> dict[str, Any]:
        """A ``text_completion``, of each prompt's results."""
        choices = [self._choice(prompt, result) for prompt, answers in enumerate(results) for result in answers]
        every = [result for answers in results for result in answers]
        return {**self._head, "choices": choices, "usage": usage(every), **_reports(results)}

    def _choice(self, prompt: int, result: Result) -> dict[str, Any]:
        echo, told = self._echoes[prompt], None
        if self._logprobs:
            tops, spelt = result.top_logprobs, result.token_bytes
            told = completion_logprobs(result.token_ids, result.logprobs, tops, spelt, len(echo))
        text, index = echo + result.text, prompt * self._n + result.index
        return {"text": text, "index": index, "logprobs": told, "finish_reason": result.finish_reason}

    def opening(self) -> list[str]:
        """The chunks before any answer: what is echoed."""
        places = [
            (prompt * self._n + each, echo) for prompt, echo in enumerate(self._echoes) for each in range(self._n)
        ]
        return [self._chunk(index, echo) for index, echo in places if echo]

    def delta(self, prompt: int, delta: Delta) -> list[str]:
        """The chunk that a delta of a prompt's answer becomes, if it brings anything."""
        index, told = prompt * self._n + delta.index, None
        if self._logprobs and delta.token_ids:
            tops, spelt, offset = delta.top_logprobs, delta.token_bytes, self._offsets[index]
            told = completion_logprobs(delta.token_ids, delta.logprobs, tops, spelt, offset)
            self._offsets[index] += sum(map(len, told["tokens"]))
        return [self._chunk(index, delta.text, logprobs=told)] if delta.text or told is not None else []

    def ending(self, results: Sequence[Sequence[Result]]) -> list[str]:
        """The last chunks; the very last has the reports."""
        every = [(prompt, result) for prompt, answers in enumerate(results) for result in answers]
        chunks: list[str] = []
        for prompt, result in every:
            more = None if self._streaming.usage or result is not every[-1][1] else _reports(results)
            chunks.append(self._chunk(prompt * self._n + result.index, "", result.finish_reason, more=more))
        if self._streaming.usage:
            counted = usage([result for _, result in every])
            chunks.append(event({**self._head, "choices": [], "usage": counted, **_reports(results)}))
        return chunks

    def _chunk(
        self,
        index: int,
        text: str,
        finish: str | None = None,
        *,
        logprobs: dict[str, Any] | None = None,
        more: dict[str, Any] | None = None,
    ) -> str:
        choice = {"text": text, "index": index, "logprobs": logprobs, "finish_reason": finish}
        chunk = {**self._head, "choices": [choice], **(more or {})}
        if self._streaming.usage:
            chunk["usage"] = None
        return event(chunk)


def _reports(results: Sequence[Sequence[Result]]) -> dict[str, Any]:
    """The report of the prompt, or of each of several."""
    told = [report(answers[0]) for answers in results]
    return {"cairn": told[0] if len(told) == 1 else {"prompts": told}}
