"""A worker whose device thread runs a fake runner, which counts on from the last token."""

from __future__ import annotations

import queue
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from prometheus_client import CollectorRegistry

from decode_service.device.worker import DecodeWorker
from decode_service.kv_source.asking import Wanted
from decode_service.metrics import DecodeMetrics
from decode_service.prompt.request_chunk import ChunkOutcome
from decode_service.scheduling.sequence import Event, Tokens
from decode_service.scheduling.sequence import Sequence as Request
from engine.kv.pool import PagedKVPool
from engine.kv.resident import ResidentChunks
from engine.kv.source import KVSource
from tests.decode_service.scheduling.scheduled import request
from tests.fakes import LAYOUT, MODEL, FakeRunner

DEADLINE_S = 30.0


class StoredEverywhere:
    """A source that has all KV."""

    model = MODEL

    def fetch(self, composition: Any, wanted: Sequence[Wanted], caller: Any) -> dict[str, int]:
        for want in wanted:
            want.outcome = ChunkOutcome(KVSource.STORE)
        return {"lookup": 1}


def heard(events: queue.SimpleQueue[list[Event]]) -> tuple[list[int], Event]:
    """All tokens that an answer's caller was told, and the end."""
    tokens: list[int] = []
    while True:
        for event in events.get(timeout=DEADLINE_S):
            if not isinstance(event, Tokens):
                return tokens, event
            tokens += [choice.token_id for choice in event.choices]


class Running:
    def __init__(self, *, runs_ahead: bool, **options: Any) -> None:
        pool = PagedKVPool(LAYOUT, pages=32, chunk_pages=16, page_size=4)
        self.runner = FakeRunner(pool, piece_tokens=8, runs_ahead=runs_ahead)
        runner: Any = self.runner
        source: Any = StoredEverywhere()
        metrics = DecodeMetrics(CollectorRegistry(), model_name="tiny", token_nbytes=1)
        self.residents = ResidentChunks(pool)
        self.worker = DecodeWorker(*(runner, self.residents, source, metrics), eos_token_ids=frozenset({50}), **options)
        self.events: dict[str, queue.SimpleQueue[list[Event]]] = {}

    def submit(self, name: str, **options: Any) -> Request:
        sequence = request(name, **options)
        self.events[name] = queue.SimpleQueue()
        sequence.deliver = self.events[name].put
        self.worker.take_place(sequence.tenant)
        self.worker.submit(sequence)
        return sequence

    def answer(self, name: str) -> tuple[list[int], Event]:
        """All tokens, and the end."""
        return heard(self.events[name])


@contextmanager
def running(*, runs_ahead: bool = True, start: bool = True, **options: Any) -> Iterator[Running]:
    it = Running(runs_ahead=runs_ahead, **options)
    if start:
        it.worker.start()
    try:
        yield it
    finally:
        it.worker.stop()
