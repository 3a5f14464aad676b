"""The device thread on a fake runner that counts on from the last token: no model, no service."""

from __future__ import annotations

import queue
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
from prometheus_client import CollectorRegistry

from decode_service.kv_source.asking import Wanted
from decode_service.metrics import DecodeMetrics
from decode_service.prompt.request_chunk import ChunkOutcome
from decode_service.sequence import Deliveries, Event, Failed, Finished, FinishReason, Tokens, hand_out
from decode_service.sequence import Sequence as Request
from decode_service.worker import DecodeWorker
from engine.kv.pool import PagedKVPool
from engine.kv.resident import ResidentChunks
from engine.kv.source import KVSource
from serving.errors import InternalFault, Overloaded, Unavailable
from tests.decode_service.scheduled import request
from tests.fakes import LAYOUT, MODEL, FakeRunner

DEADLINE_S = 30.0


class StoredEverywhere:
    """A source that has all KV."""

    model = MODEL

    def fetch(self, composition: Any, wanted: Sequence[Wanted], caller: Any) -> dict[str, int]:
        for want in wanted:
            want.outcome = ChunkOutcome(KVSource.STORE)
        return {"lookup": 1}


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
        tokens: list[int] = []
        while True:
            for event in self.events[name].get(timeout=DEADLINE_S):
                if not isinstance(event, Tokens):
                    return tokens, event
                tokens += [choice.token_id for choice in event.choices]


@contextmanager
def running(*, runs_ahead: bool = True, start: bool = True, **options: Any) -> Iterator[Running]:
    it = Running(runs_ahead=runs_ahead, **options)
    if start:
        it.worker.start()
    try:
        yield it
    finally:
        it.worker.stop()


@pytest.mark.parametrize("runs_ahead", [False, True])
def test_answers_of_several_requests_and_where_their_kv_came_from(runs_ahead: bool) -> None:
    with running(runs_ahead=runs_ahead, start=False) as it:
        one = it.submit("one", chunks=[("doc", 8)], max_tokens=6)
        two = it.submit("two", chunks=[("doc", 8)], max_tokens=3)
        it.worker.start()
        assert it.answer("one") == ([7, 8, 9, 10, 11, 12], Finished(FinishReason.LENGTH))
        assert it.answer("two") == ([7, 8, 9], Finished(FinishReason.LENGTH))
        assert [s.composition.chunks[0].outcome for s in (one, two)] == [
            *(ChunkOutcome(KVSource.STORE), ChunkOutcome(KVSource.DEVICE))
        ]
    assert it.worker.occupancy().pages["tail"] == 0


def test_a_long_prompt_and_a_chunk_of_its_own_come_in_pieces() -> None:
    with running() as it:
        it.submit("one", chunks=[("doc", 20)], tail=19, max_tokens=1, bypass=True)
        assert it.answer("one")[0] == [7]
        assert [len(ids) for ids, _ in it.runner.computed] == [8, 8, 4, 8, 8, 3]
        assert not len(it.residents)


@pytest.mark.parametrize("runs_ahead", [False, True])
def test_a_first_token_waits_for_no_piece_but_the_one_that_was_begun(runs_ahead: bool) -> None:
    with running(runs_ahead=runs_ahead, start=False) as it:
        delivered: list[str] = []

        def deliver(deliveries: Deliveries) -> None:
            delivered.extend(sequence.request_id for sequence in deliveries)
            hand_out(deliveries)

        for name in "abcd":
            it.submit(name, tail=2, max_tokens=1)
        told: list[int] = []
        it.runner.before = lambda: told.append(len(delivered))
        it.worker.start(deliver)
        for name in "abcd":
            it.answer(name)
        assert delivered == list("abcd") and told == ([0, 0, 1, 2] if runs_ahead else [0, 1, 2, 3])


def test_a_forward_that_fails_ends_those_in_it_and_nobody_else() -> None:
    with running(start=False) as it:
        it.submit("broken", tail=3)
        it.submit("other", tail=3, max_tokens=2)
        fails = iter([True])

        def before() -> None:
            if next(fails, False):
                raise RuntimeError("out of memory")

        it.runner.before = before
        it.worker.start()
        tokens, end = it.answer("broken")
        assert not tokens and isinstance(end, Failed) and isinstance(end.error, InternalFault)
        assert it.answer("other") == ([7, 8], Finished(FinishReason.LENGTH))


def test_an_abort_ends_a_request_and_gives_its_pages_back() -> None:
    with running() as it:
        sequence = it.submit("one", max_tokens=40)
        it.events["one"].get(timeout=DEADLINE_S)
        it.worker.end("one", FinishReason.ABORT, sequence.owner)
        assert it.answer("one")[1] in (Finished(FinishReason.ABORT), Finished(FinishReason.LENGTH))


def test_a_fault_of_the_device_thread_is_told_to_all_and_takes_nobody_in() -> None:
    failed: list[bool] = []
    with running(start=False, on_failure=lambda: failed.append(True)) as it:
        it.submit("one")

        def fault() -> None:
            raise MemoryError

        it.worker.call(fault)
        it.worker.start()
        end = it.answer("one")[1]
        assert isinstance(end, Failed) and isinstance(end.error, InternalFault) and "MemoryError" in str(end.error)
        it.worker._thread.join(DEADLINE_S)
        assert failed == [True]
        with pytest.raises(Unavailable, match="restart"):
            it.submit("late")


def test_the_line_is_bounded_and_says_when_to_come_again() -> None:
    with running(start=False, waiting_max=2) as it:
        it.submit("one")
        it.submit("two")
        with pytest.raises(Overloaded) as caught:
            it.submit("three")
        assert caught.value.retry_after_s
        assert it.worker.occupancy().waiting == 2
        it.worker.start()
        assert it.answer("two")[1] == Finished(FinishReason.LENGTH)


def test_a_step_is_handed_over_once_for_all_its_requests() -> None:
    """Each hand-over to another thread lets go of the interpreter, so there is one a step and not one a request."""
    steps: list[Deliveries] = []

    def deliver(events: Deliveries) -> None:
        steps.append(events)
        hand_out(events)

    with running(start=False) as it:
        names = ["one", "two", "three"]
        for name in names:
            it.submit(name, max_tokens=5)
        it.worker.start(deliver)
        assert [it.answer(name)[1] for name in names] == [Finished(FinishReason.LENGTH)] * 3
    assert any(len(step) == 3 for step in steps)
    assert len(steps) < 3 * 5, "less than one for each token"
