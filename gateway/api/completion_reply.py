"""The JSON of a completion's answers: one object, or chunks of a stream."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from cairn import Delta, Result
from gateway.api.extension import report
from gateway.api.logprobs import completion_logprobs, words
from gateway.api.streaming import Streaming
from gateway.api.usage import usage
from gateway.streams import event


@dataclass(frozen=True)
class Echo:
    """What stands before a prompt's answers: its text, and if ``scored`` its tokens with their log-probabilities.

    ``alone``: nothing stands behind it, what was generated is left out.
    """

    text: str = ""
    scored: bool = False
    alone: bool = False


class CompletionReply:
    """The answers to a request's prompts, ``n`` to each, behind the ``echoes`` of the prompts.

    ``logprobs``: they were asked for.
    """

    def __init__(
        self, request_id: str, model: str, streaming: Streaming, *, n: int, echoes: Sequence[Echo], logprobs: bool
    ) -> None:
        self._streaming = streaming
        self._n = n
        self._echoes = echoes
        self._logprobs = logprobs
        self._offsets = [len(echo.text) for echo in echoes for _ in range(n)]  # characters that are out
        self._head = {
            "id": f"cmpl-{request_id}",
            "object": "text_completion",
            "created": int(time.time()),
            "model": model,
        }

    def whole(self, results: Sequence[Sequence[Result]]) -> dict[str, Any]:
        """A ``text_completion``, of each prompt's results."""
        choices = [
            self._choice(prompt, answers[0], result) for prompt, answers in enumerate(results) for result in answers
        ]
        every = [result for answers in results for result in answers]
        return {**self._head, "choices": choices, "usage": usage(every), **_reports(results)}

    def _choice(self, prompt: int, first: Result, result: Result) -> dict[str, Any]:
        """One answer; what is known of the prompt's tokens came with its ``first``."""
        echo, told = self._echoes[prompt], None
        spelt = {**first.token_bytes, **result.token_bytes}
        scored = first.prompt_logprobs if echo.scored else ()
        ids, values = [each.token_id for each in scored], [each.logprob for each in scored]
        tops = [each.top for each in scored]
        before = echo.text or "".join(words(token, spelt) for token in ids)
        if not echo.alone:
            ids += result.token_ids
            values += result.logprobs
            tops += result.top_logprobs or [()] * len(result.token_ids)
        if self._logprobs:
            told = completion_logprobs(ids, values, tops if any(tops) else (), spelt, 0 if scored else len(before))
        text, index = before if echo.alone else before + result.text, prompt * self._n + result.index
        return {"text": text, "index": index, "logprobs": told, "finish_reason": result.finish_reason}

    def opening(self) -> list[str]:
        """The chunks before any answer: what is echoed."""
        each = [echo.text for echo in self._echoes for _ in range(self._n)]
        return [self._chunk(index, text) for index, text in enumerate(each) if text]

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
