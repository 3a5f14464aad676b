"""Rows of many requests in steps that are begun ahead, through the real worker: answers are those of one at a time."""

from __future__ import annotations

import queue
import random
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
from prometheus_client import CollectorRegistry

from decode_service.device.worker import DecodeWorker
from decode_service.metrics import DecodeMetrics
from decode_service.scheduling.sequence import Event, Failed, Finished, FinishReason, Sequence
from engine.kv.pool import PagedKVPool
from engine.kv.resident import ResidentChunks
from engine.sight import EVERYTHING, Sight
from serving.errors import InternalFault
from tests.decode_service.content import EOS, ContentRunner, NothingStored, content_request
from tests.decode_service.device.running import DEADLINE_S, heard
from tests.decode_service.scheduling.scheduled import request
from tests.fakes import LAYOUT


class Served:
    """A worker over a ``ContentRunner``, and what it tells each request."""

    def __init__(
        self,
        *,
        batch_max: int = 5,
        pages: int = 96,
        chunk_pages: int = 40,
        aside_pages: int = 0,
        sight: Sight = EVERYTHING,
        runner: type[ContentRunner] = ContentRunner,
        **options: Any,
    ) -> None:
        pool = PagedKVPool(LAYOUT, pages=pages, chunk_pages=chunk_pages, page_size=4)
        self.runner = runner(pool, piece_tokens=8, slots=batch_max, step_rows=12, **options)
        self.sight = sight
        self.registry = CollectorRegistry()
        self.residents = ResidentChunks(pool)
        source: Any = NothingStored()
        made: Any = self.runner
        metrics = DecodeMetrics(self.registry, model_name="tiny", token_nbytes=1)
        self.worker = DecodeWorker(
            *(made, self.residents, source, metrics),
            eos_token_ids=frozenset({EOS}),
            batch_max=batch_max,
            aside_nbytes=aside_pages * LAYOUT.nbytes(pool.page_size),
            sight=sight,
        )
        self.told: dict[str, queue.SimpleQueue[list[Event]]] = {}

    def submit(self, sequence: Sequence) -> None:
        sequence.deliver = self.told.setdefault(sequence.request_id, queue.SimpleQueue()).put
        self.worker.take_place(sequence.tenant)
        self.worker.submit(sequence)

    def answer(self, name: str) -> tuple[list[int], Event]:
        return heard(self.told[name])

    def counted(self, name: str, **labels: str) -> float:
        value = self.registry.get_sample_value(f"cairn_{name}", {"model_name": "tiny", **labels})
        assert value is not None
        return value

    def check_idle(self) -> None:
        done = threading.Event()
        self.worker.call(done.set)  # what ended requests had in flight is behind us
        assert done.wait(DEADLINE_S)
        self.residents.check_integrity()
        assert self.residents.held == 0 and self.worker.occupancy().pages["tail"] == 0


@contextmanager
def served(*, start: bool = True, **options: Any) -> Iterator[Served]:
    it = Served(**options)
    if start:
        it.worker.start()
    try:
        yield it
    finally:
        it.worker.stop()


def one_at_a_time(seed: int, count: int) -> list[tuple[list[int], Event]]:
    """The answers of requests that are alone, pieces alone, every step read at once."""
    rng = random.Random(seed)
    with served() as it:
        answers = []
        for n in range(count):
            it.submit(content_request(f"{n}", rng))
            answers.append(it.answer(f"{n}"))
        assert all(isinstance(end, Finished) for _, end in answers)
        it.check_idle()
    return answers


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(
    "options",
    [
        {"packs": True, "runs_ahead": True},
        {"packs": True, "runs_ahead": True, "long": 9},
        {"packs": True, "runs_ahead": False},
        {"packs": False, "runs_ahead": True},
        {"packs": False, "runs_ahead": False},
    ],
)
def test_answers_in_any_company_are_those_of_one_at_a_time(options: dict[str, Any], seed: int) -> None:
    count, rng, chance = 30, random.Random(seed), random.Random(seed + 100)
    expected = one_at_a_time(seed, count)
    ended = set()
    with served(**options) as it:
        for n in range(count):
            it.submit(content_request(f"{n}", rng))
            if chance.random() < 0.2:  # somebody who is here, or was
                ended.add(f"{chance.randint(max(0, n - 6), n)}")
                it.worker.end(max(ended, key=int), FinishReason.ABORT)
        answers = [it.answer(f"{n}") for n in range(count)]
        it.check_idle()
        drawn = sum(len(tokens) for tokens, _ in answers)
        assert it.counted("generation_tokens_total") == drawn
        first = sum(bool(tokens) for tokens, _ in answers)
        assert it.counted("decode_batch_size_sum") == drawn - first
    for n, ((tokens, end), (alone, alone_end)) in enumerate(zip(answers, expected, strict=True)):
        if end == Finished(FinishReason.ABORT):
            assert f"{n}" in ended and tokens == alone[: len(tokens)]
        else:
            assert (tokens, end) == (alone, alone_end)


def test_the_next_step_begins_before_the_last_one_is_read_whoever_joins_or_leaves() -> None:
    rng, joins = random.Random(5), iter(range(40))
    with served(start=False, packs=True, runs_ahead=True) as it:
        it.submit(replace(request("long", max_tokens=60), bypass=True))
        before = it.runner.begin

        def begin(batch: Any) -> Any:
            n = next(joins, None)
            if n is not None and n % 3 == 0:
                it.submit(content_request(f"{n}", rng, max_tokens=1 + n % 4))
            return before(batch)

        it.runner.begin = begin
        it.worker.start()
        tokens, _ = it.answer("long")
        for name in [name for name in it.told if name != "long"]:
            it.answer(name)
    steps = [number for number, batch in enumerate(it.runner.batches, start=1) if batch]
    waited = [number for what, number in it.runner.log if what == "w"]
    assert waited == steps, "each step is read once, in order"
    ahead = [it.runner.log.index(("w", n)) > it.runner.log.index(("b", n + 1)) for n in steps[:-1]]
    assert all(ahead[: len(tokens) - 2]) and len(tokens) > 20
    assert any(len(batch) > 2 for batch in it.runner.batches)


def test_a_step_that_fails_ends_everybody_in_it_and_the_next_are_served() -> None:
    rng = random.Random(1)
    expected = one_at_a_time(1, 4)
    with served(start=False, packs=True, runs_ahead=True) as it:
        for n in range(4):
            it.submit(content_request(f"{n}", rng))
        failing = iter([False, False, False, True])

        def before() -> None:
            if next(failing, False):
                raise RuntimeError("out of memory")

        it.runner.before = before
        it.worker.start()
        answers = [it.answer(f"{n}") for n in range(4)]
        failed = [n for n, (_, end) in enumerate(answers) if isinstance(end, Failed)]
        assert failed and all(isinstance(answers[n][1].error, InternalFault) for n in failed)  # type: ignore[union-attr]
        for n, (tokens, end) in enumerate(answers):
            assert tokens == expected[n][0][: len(tokens)] and (n in failed or end == expected[n][1])
        rng = random.Random(1)
        for n in range(4):
            it.submit(replace(content_request(f"{n}", rng), request_id=f"again{n}"))
        assert [it.answer(f"again{n}") for n in range(4)] == expected
        it.check_idle()


def test_a_step_that_fails_when_it_is_read_ends_everybody_in_it() -> None:
    with served(start=False, packs=True, runs_ahead=True) as it:
        it.submit(request("one", max_tokens=9))
        it.submit(request("two", max_tokens=9))
        it.runner.lost = 3
        it.worker.start()
        for name in ("one", "two"):
            tokens, end = it.answer(name)
            assert len(tokens) == 2 and isinstance(end, Failed)
        it.submit(request("three", max_tokens=3))
        assert it.answer("three")[1] == Finished(FinishReason.LENGTH)
        it.check_idle()


@pytest.mark.parametrize("runs_ahead", [False, True])
def test_a_row_without_a_number_to_choose_by_ends_one_request(runs_ahead: bool) -> None:
    with served(start=False, packs=True, runs_ahead=runs_ahead) as it:
        it.submit(request("good", max_tokens=9))
        it.submit(request("bad", max_tokens=9))
        real = it.runner.token

        def token(rows: Any, ids: list[int]) -> int:
            lost = rows.draw.slot == 1 and rows.draw.index == 3 and it.runner.requests[1].params.max_tokens == 9
            return -1 if lost else max(0, real(rows, [max(0, each) for each in ids]))

        it.runner.token = token
        it.worker.start()
        tokens, end = it.answer("bad")
        assert len(tokens) == 3 and isinstance(end, Failed) and "ArithmeticError" in str(end.error)
        assert len(it.answer("good")[0]) == 9
        it.check_idle()


def test_more_places_than_the_runner_has_slots_are_refused() -> None:
    pool = PagedKVPool(LAYOUT, pages=8, chunk_pages=4, page_size=4)
    runner: Any = ContentRunner(pool, slots=4)
    source: Any = NothingStored()
    metrics = DecodeMetrics(CollectorRegistry(), model_name="tiny", token_nbytes=1)
    with pytest.raises(ValueError, match=r"batch-max: 5 .* the runner has 4"):
        DecodeWorker(runner, ResidentChunks(pool), source, metrics, eos_token_ids=frozenset(), batch_max=5)
