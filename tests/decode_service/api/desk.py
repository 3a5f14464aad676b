"""The decode service over a worker that says what it is told to."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from prometheus_client import CollectorRegistry

from chunk_store.open import open_store
from chunk_store.tenant import Tenant
from decode_service.api.service import DecodeService
from decode_service.metrics import Steps
from decode_service.prompt.resolver import Resolver
from decode_service.scheduling.sequence import Finished, FinishReason, Tokens
from engine.sampling.params import Choice
from protos import decode_pb2
from serving.errors import RequestError
from serving.rpc.access import Access
from serving.trace.stages import StageClock
from tests.fakes import FakeServed, codec

Script = Callable[[Any], None]

TOKENS = "ann salt-a\nbob salt-b\nboss - admin\n"


def choices(text: str) -> tuple[Choice, ...]:
    return tuple(Choice(token, None) for token in codec().encode(text))


def says(*texts: str, end: FinishReason = FinishReason.LENGTH) -> Script:
    """A batch of tokens for each text, then the end."""

    def script(sequence: Any) -> None:
        sequence.clock.first_token = 1
        for text in texts:
            sequence.deliver([Tokens(choices(text))])
        sequence.deliver([Finished(end)])

    return script


def silent(sequence: Any) -> None:
    """No event ever, unless it is ended."""


class ScriptedWorker:
    def __init__(self) -> None:
        self.script: Script = silent
        self.places_taken = 0
        self.refuses: RequestError | None = None
        self.too_large: RequestError | None = None
        self.sequences: list[Any] = []
        self.ended: list[tuple[str, FinishReason, Tenant]] = []
        self.over: list[Any] = []
        self.finished: list[tuple[Any, FinishReason]] = []
        self.submitted = asyncio.Event()
        self.metrics = SimpleNamespace(first_token_sent=self._first_token, steps=Steps(3, 40, 50))
        self.first_tokens: list[StageClock] = []
        self.waiting_max, self.batch_max = 7, 3
        self.residents = SimpleNamespace(pool=SimpleNamespace(page_size=4))
        self.places = SimpleNamespace(of=lambda tenant: (1, 2))
        self.stopped = False

    def _first_token(self, clock: StageClock) -> None:
        self.first_tokens.append(clock)

    def start(self, deliver: Callable[[Any], None]) -> None:
        self.deliver = deliver

    def stop(self) -> None:
        self.stopped = True

    def take_place(self, tenant: Tenant, answers: int) -> None:
        if self.refuses:
            raise self.refuses
        self.places_taken += answers

    def leave_place(self, tenant: Tenant) -> None:
        self.places_taken -= 1

    def check_size(self, sequence: Any) -> None:
        if self.too_large:
            raise self.too_large

    def submit(self, *sequences: Any) -> None:
        self.sequences += sequences
        self.submitted.set()
        for sequence in sequences:
            self.script(sequence)

    def end(self, request_id: str, reason: FinishReason, owner: Tenant) -> None:
        self.ended.append((request_id, reason, owner))
        for sequence in self.sequences:
            if (sequence.request_id, sequence.owner) == (request_id, owner) and sequence not in self.over:
                self.finish(sequence, reason)

    def finish(self, sequence: Any, reason: FinishReason) -> None:
        self.over.append(sequence)
        self.finished.append((sequence, reason))
        sequence.deliver([Finished(reason)])

    def occupancy(self) -> Any:
        pages = {"free": 6, "chunk": 1, "tail": 1}
        return SimpleNamespace(running=2, waiting=5, chunks_resident=4, pages=pages, usage=0.25)


class Call:
    def __init__(self, token: str = "", left_s: float | None = None) -> None:
        self._metadata = (("authorization", f"Bearer {token}"),) if token else ()
        self._left_s = left_s

    def invocation_metadata(self) -> tuple[tuple[str, str], ...]:
        return self._metadata

    def set_trailing_metadata(self, metadata: object) -> None: ...

    def time_remaining(self) -> float | None:
        return self._left_s


def request(*texts: str, **fields: Any) -> decode_pb2.GenerateRequest:
    segments = [decode_pb2.Segment(text=text) for text in texts or ("why?",)]
    return decode_pb2.GenerateRequest(segments=segments, **fields)


class Desk:
    """A service over a scripted worker; with ``tokens`` it asks who calls."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.store = open_store(f"file://{root / 'store'}")
        self.worker: Any = None
        self.service: Any = None

    def run(self, body: Callable[[], Awaitable[None]], *, tokens: str = "", timeout_s: float = 30.0) -> None:
        file = self.root / "tokens"
        file.write_text(tokens)
        access = Access.from_file(file) if tokens else Access()
        served: Any = FakeServed()

        async def main() -> None:
            self.worker = ScriptedWorker()
            self.service = DecodeService(
                self.worker, Resolver(served, codec(), self.store), access, CollectorRegistry(),
                model_name="tiny", request_timeout_s=timeout_s, close=lambda: None,
            )  # fmt: skip
            await self.service.start()
            await body()
            assert not len(self.service.ids) and not self.service.ids._aborted
            await self.service.stop()
            assert self.worker.stopped

        asyncio.run(asyncio.wait_for(main(), 60))

    async def answer(self, asked: decode_pb2.GenerateRequest, call: Any = None) -> tuple[str, Any, Sequence[Any]]:
        """Text, completion, deltas."""
        replies = [reply async for reply in self.service.Generate(asked, call or Call())]
        deltas = [reply.delta for reply in replies[:-1]]
        assert all(reply.WhichOneof("event") == "delta" for reply in replies[:-1])
        return "".join(delta.text for delta in deltas), replies[-1].complete, deltas


async def running(desk: Desk, request_id: str, call: Any = None) -> asyncio.Task[Any]:
    desk.worker.submitted.clear()
    task = asyncio.create_task(desk.answer(request(request_id=request_id), call))
    await asyncio.wait_for(desk.worker.submitted.wait(), 20)
    return task
