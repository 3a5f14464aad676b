"""Our own decode service as a target: documents and turns go as chunks, by their ids as soon as these are known."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

from cairn.client.answers import Result
from cairn.client.async_client import AsyncClient
from cairn.client.calls import GenerateOptions
from cairn.client.chunks import ChunkRef
from cairn.client.errors import CairnError, NotFound
from cairn.client.prompt import Text, Tokens
from cairn.client.requests import Segment
from cairn.load.answer import OK, Answer
from cairn.load.target import Heard, Known, Sampling
from cairn.load.workload import Content, Request, Workload, joined

HISTORIES = ("kept", "chunks", "tail")  # what becomes of earlier turns
START_S = 60.0  # until the first answer of any kind


@dataclass(frozen=True)
class CairnTarget:
    """The decode service at ``decode``, over gRPC. ``history``: earlier turns are kept, sent as chunks, or sent again
    as part of the query."""

    decode: str
    token: str | None = None
    tls: Path | None = None
    salt: str = ""
    timeout_s: float = 300.0
    reuse: str = "exact"
    order: str = "given"
    history: str = "kept"
    sampling: Sampling = field(default_factory=Sampling)

    @asynccontextmanager
    async def open(self, workload: Workload, known: Known, heard: Heard) -> AsyncIterator[CairnCaller]:
        """A connection that is there. Raises ``CairnError`` if it is not."""
        async with AsyncClient(
            decode=self.decode,
            token=self.token,
            tls=self.tls,
            salt=self.salt,
            timeout_s=self.timeout_s,
            wait_overloaded=False,  # who is turned away is counted, not asked again
        ) as client:
            await client.loads(timeout_s=min(START_S, self.timeout_s))
            yield CairnCaller(self, client, workload, known, heard)


class CairnCaller:
    """A connection to the decode service."""

    def __init__(
        self, target: CairnTarget, client: AsyncClient, workload: Workload, known: Known, heard: Heard
    ) -> None:
        self._target, self._client, self._known, self._heard = target, client, known, heard
        self._workload, self._documents = workload, workload.documents

    def session(self, number: int, turns: int) -> CairnConversation:
        return CairnConversation(self, number, self._target.history if turns > 1 else "")

    def named(self, request: Request) -> list[Segment]:
        """The documents of a request: by their ids where these are known, else in full."""
        segments: list[Segment] = []
        for place in request.documents:
            chunk_id = self._known.get((self._workload.key, place))
            kind = "system_prompt" if place < self._workload.systems else "rag_result"
            segments.append(segment(self._documents[place], kind) if chunk_id is None else ChunkRef(chunk_id))
        return segments

    def learnt(self, request: Request, chunk_ids: list[str]) -> None:
        """What the documents of an answered request are registered as."""
        for place, chunk_id in zip(request.documents, chunk_ids, strict=False):
            if chunk_id:
                self._known[self._workload.key, place] = chunk_id

    def forget(self, request: Request) -> None:
        """A chunk is gone: the ids of the request's documents are not used again."""
        for place in request.documents:
            self._known.pop((self._workload.key, place), None)

    async def stream(
        self, segments: list[Segment], max_tokens: int, seed: int, keep: bool, answer: Answer
    ) -> Result | None:
        """Asks and fills ``answer``; the result if there is one. Raises ``NotFound`` before the first token."""
        sampling, target = self._target.sampling, self._target
        options: GenerateOptions = {
            "max_tokens": max_tokens,
            "reuse": target.reuse,
            "order": target.order,
            "keep": keep,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "ignore_eos": sampling.ignore_eos,
        }
        if sampling.temperature:
            options["seed"] = seed
        try:
            async with self._client.generate(segments, **options) as stream:
                async for delta in stream:
                    if delta.token_ids:
                        answer.times.append(time.monotonic())
                        answer.counts.append(len(delta.token_ids))
                        self._heard(answer, len(delta.token_ids))
        except NotFound as error:
            if not answer.times:
                raise
            failed(answer, error)
            return None
        except CairnError as error:
            failed(answer, error)
            return None
        read(stream.result, answer)
        return stream.result


class CairnConversation:
    """One session, and what of it was said: as it is named, and in full."""

    def __init__(self, caller: CairnCaller, number: int, history: str) -> None:
        self._caller, self._number, self._keeps = caller, number, history
        self._named: list[Segment] = []
        self._whole: list[Segment] = []
        self._said: list[Content] = []  # where it is part of the query
        self._turn = 0

    async def ask(self, request: Request, max_tokens: int, answer: Answer) -> None:
        """See ``Conversation``. Where a chunk is gone, everything is sent in full, once."""
        caller, seed = self._caller, self._number * 1000 + self._turn
        query = segment(joined([*self._said, request.query]))
        rest = max_tokens, seed, self._keeps == "kept", answer
        try:
            try:
                result = await caller.stream([*caller.named(request), *self._named, query], *rest)
            except NotFound:
                caller.forget(request)
                result = await caller.stream([*caller.named(request), *self._whole, query], *rest)
        except NotFound as error:
            failed(answer, error)
            return
        if result is not None:
            self._remember(request, result)

    def _remember(self, request: Request, result: Result) -> None:
        self._turn += 1
        stood = sorted(result.reuse.segments, key=lambda each: each.given_index)
        ids = [each.chunk_id for each in stood]
        self._caller.learnt(request, ids)
        turn: Content = (
            request.query + result.text if isinstance(request.query, str) else (*request.query, *result.token_ids)
        )
        if self._keeps == "tail":
            self._said.append(turn)
        elif self._keeps == "kept" and result.kept is not None:
            whole = Tokens((*result.kept.query_token_ids, *result.token_ids), type="turn")
            self._whole.append(whole)
            self._named.append(ChunkRef(result.kept.id) if result.kept.registered else whole)
        elif self._keeps:
            self._named = [ChunkRef(each) for each in ids[len(request.documents) : -1]]
            self._named.append(segment(turn, "turn"))
            self._whole.append(segment(turn, "turn"))


def segment(content: Content, kind: str = "") -> Segment:
    """Content as a segment of a prompt."""
    return Text(content, type=kind) if isinstance(content, str) else Tokens(content, type=kind)


def failed(answer: Answer, error: CairnError) -> None:
    """Why there is no answer, or not all of it."""
    answer.status, answer.detail, answer.retry_after_s = error.code, error.message, error.retry_after_s


def read(result: Result, answer: Answer) -> None:
    """What the service says of an answer."""
    answer.status, answer.finish_reason = OK, result.finish_reason
    answer.prompt_tokens = result.usage.prompt_tokens
    for part in result.reuse.segments:
        for name, count in ((part.source, part.cached_tokens), ("computed", part.tokens - part.cached_tokens)):
            if count:
                answer.reused[name] = answer.reused.get(name, 0) + count
    for stage, seconds in vars(result.timings).items():
        if seconds:
            answer.stages_ms[stage.removesuffix("_s")] = seconds * 1e3
