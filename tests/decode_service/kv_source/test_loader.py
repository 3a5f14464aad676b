"""Loads in threads of their own: each outcome is told to the scheduler, and it is asked what only it may decide."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from decode_service.kv_source.asking import FetchTerms, NoRoomToAsk
from decode_service.kv_source.loader import Loader
from decode_service.prompt.request_chunk import ChunkOutcome
from decode_service.scheduling.sequence import Failed, Sequence, State
from engine.kv.source import KVSource
from serving.errors import Cancelled, InternalFault, NotFound
from tests.decode_service.scheduling.scheduled import Scheduled, request

DEADLINE_S = 30.0
Fetch = Callable[[Any, Any, FetchTerms], dict[Any, int]]


class NoMemory:
    def of(self, resident: Any) -> None:
        return None


class Loading:
    """A request whose load runs ``fetch``; what is posted to the device thread waits in ``posted``."""

    def __init__(self, fetch: Fetch) -> None:
        self.on = Scheduled(batch_max=1)
        self.posted: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        source: Any = type("Source", (), {"fetch": staticmethod(fetch)})
        memory: Any = NoMemory()
        self.loader = Loader(source, memory, self.on.scheduler, self.posted.put, threads=2)

    def begin(self, name: str = "one", **options: Any) -> Sequence:
        sequence = request(name, [(f"doc of {name}", 8)], **options)
        self.on.submit(sequence)
        for fill in self.on.plan().loads:
            self.loader.start(fill)
        return sequence

    def take(self) -> None:
        """The device thread's next turn."""
        self.posted.get(timeout=DEADLINE_S)()
        self.on.listen()


@pytest.fixture
def loading() -> Iterator[Callable[[Fetch], Loading]]:
    made: list[Loading] = []

    def make(fetch: Fetch) -> Loading:
        made.append(Loading(fetch))
        return made[-1]

    yield make
    for each in made:
        each.loader.stop()


def stored(composition: Any, wanted: Any, terms: FetchTerms) -> dict[Any, int]:
    for want in wanted:
        want.outcome = ChunkOutcome(KVSource.STORE)
    return {"load": 5}


def test_what_was_loaded_is_told(loading: Callable[[Fetch], Loading]) -> None:
    it = loading(stored)
    one = it.begin()
    it.take()
    assert one.composition.chunks[0].outcome == ChunkOutcome(KVSource.STORE) and one.clock.measured_ns == {"load": 5}
    it.on.plan()
    assert one.state is State.PREFILLING


def test_who_waits_for_a_chunk_that_came_goes_on_while_others_are_loaded(
    loading: Callable[[Fetch], Loading],
) -> None:
    release = threading.Event()

    def fetch(composition: Any, wanted: Any, terms: FetchTerms) -> dict[Any, int]:
        wanted[0].outcome = ChunkOutcome(KVSource.COMPUTED)
        terms.came(wanted[0])
        release.wait(DEADLINE_S)
        wanted[1].outcome = ChunkOutcome(KVSource.STORE)
        return {"load": 5}

    it = loading(fetch)
    one = request("one", [("shared", 8), ("own", 8)])
    other = request("other", [("shared", 8)])
    it.on.submit(one, other)
    for fill in it.on.plan().loads:
        it.loader.start(fill)
    it.take()
    it.on.plan()
    assert (one.state, other.state) == (State.LOADING, State.PREFILLING)
    release.set()
    it.take()
    it.on.plan()
    assert [chunk.outcome for chunk in one.composition.chunks] == [
        *(ChunkOutcome(KVSource.COMPUTED), ChunkOutcome(KVSource.STORE))
    ]


@pytest.mark.parametrize(
    ("error", "told"), [(NotFound("no such chunk"), NotFound), (ZeroDivisionError(), InternalFault)]
)
def test_a_load_that_fails_ends_its_request(
    loading: Callable[[Fetch], Loading], error: Exception, told: type[Exception]
) -> None:
    def fetch(composition: Any, wanted: Any, terms: FetchTerms) -> dict[Any, int]:
        raise error

    it = loading(fetch)
    one = it.begin()
    it.take()
    (end,) = it.on.events[one]
    assert isinstance(end, Failed) and isinstance(end.error, told)


def test_the_scheduler_says_who_may_wait_for_computing(loading: Callable[[Fetch], Loading]) -> None:
    """The second one is put off while the first has the only room; it was not told so in the loader's thread."""
    release = threading.Event()
    asked_in: set[str] = set()

    def fetch(composition: Any, wanted: Any, terms: FetchTerms) -> dict[Any, int]:
        if not terms.may_ask():
            raise NoRoomToAsk
        release.wait(DEADLINE_S)
        return stored(composition, wanted, terms)

    it = loading(fetch)
    may_ask = it.on.scheduler.may_ask

    def noted(fill: Any) -> bool:
        asked_in.add(threading.current_thread().name)
        return may_ask(fill)

    it.on.scheduler.may_ask = noted
    first = it.begin("first")
    it.take()
    second = it.begin("second")
    it.take()  # it asks
    it.take()  # it is put off
    assert (first.state, second.state, second.cold) == (State.LOADING, State.WAITING, True)
    assert asked_in == {threading.current_thread().name}
    release.set()
    it.take()
    it.on.plan()
    assert first.state is State.PREFILLING


def test_who_waits_for_an_answer_stops_when_nobody_waits_for_him(loading: Callable[[Fetch], Loading]) -> None:
    ended: queue.SimpleQueue[Exception] = queue.SimpleQueue()

    def fetch(composition: Any, wanted: Any, terms: FetchTerms) -> dict[Any, int]:
        try:
            terms.may_ask()
        except Exception as error:
            ended.put(error)
            raise
        return {}

    it = loading(fetch)
    it.on.abort(it.begin())
    assert isinstance(ended.get(timeout=DEADLINE_S), Cancelled)
