"""What a request would reuse and move, from a pool and a store as they are, without running it."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from chunk_store.entry import MissReason
from chunk_store.key import ChunkKey
from decode_service.api import explain as module
from decode_service.api.explain import explain
from decode_service.prompt.composition import Composition
from engine.kv.source import KVSource
from engine.plan import Window
from engine.reuse import ReuseMode
from engine.sight import EVERYTHING, Sight
from tests.decode_service.prompts import composed
from tests.fakes import LAYOUT, MODEL


class Worker:
    """A device thread that looks at once, or never."""

    def __init__(self, resident: dict[ChunkKey, int], *, hangs: bool = False) -> None:
        self.model = MODEL
        self.sight = EVERYTHING
        self.runner = SimpleNamespace(pool=SimpleNamespace(layout=LAYOUT))
        found = {key: SimpleNamespace(holders=holders) for key, holders in resident.items()}
        self.residents = SimpleNamespace(find=found.get)
        self.hangs = hangs

    def call(self, look: Callable[[], None]) -> None:
        if not self.hangs:
            look()


class Store:
    def __init__(self, *stored: ChunkKey) -> None:
        self.stored = stored
        self.asked: list[tuple[Any, ...]] = []

    def lookup(self, keys: list[ChunkKey]) -> list[object | None]:
        return [object() if key in self.stored else None for key in keys]

    def miss_reason(self, *asked: Any) -> MissReason:
        self.asked.append(asked)
        return MissReason.EVICTED


def sources(composition: Composition) -> list[KVSource | None]:
    return [chunk.outcome.source if chunk.outcome else None for chunk in composition.chunks]


def told(worker: Any, store: Any, composition: Composition, **options: Any) -> Any:
    return explain(worker, store, composition, **options)


def test_each_chunk_comes_from_the_nearest_place() -> None:
    composition = composed((1,) * 2, (2,) * 3, (3,) * 4, query=(9, 9))
    first, second, third = composition.chunks
    store = Store(first.key, second.key)
    found = told(Worker({first.key: 2}), store, composition)
    assert sources(composition) == [KVSource.DEVICE, KVSource.STORE, KVSource.COMPUTED]
    assert third.outcome is not None and third.outcome.miss_reason is MissReason.EVICTED
    assert store.asked == [(third.key, third.segment.chunk_id, MODEL, third.tenant)]
    assert found.nbytes_to_load == LAYOUT.nbytes(3)
    assert found.nbytes_to_compute == LAYOUT.nbytes(4) + LAYOUT.nbytes(2)
    assert found.nbytes_per_step == LAYOUT.nbytes(2 + 3 + 4 + 2)
    assert found.nbytes_shared == LAYOUT.nbytes(2) and composition.cached_tokens == 5


def test_of_what_is_shared_what_the_next_row_sees_is_read() -> None:
    composition = composed((1,) * 2, (2,) * 3, (3,) * 4, query=(9, 9))
    worker = Worker({chunk.key: 1 for chunk in composition.chunks})
    worker.sight = Sight((Window(8),))
    found = told(worker, Store(), composition)
    assert found.nbytes_per_step == LAYOUT.nbytes(8) and found.nbytes_shared == LAYOUT.nbytes(6)


def test_what_no_running_request_reads_is_not_shared() -> None:
    composition = composed((1, 1))
    assert told(Worker({composition.chunks[0].key: 0}), Store(), composition).nbytes_shared == 0
    assert sources(composition) == [KVSource.DEVICE]


def test_the_second_place_of_a_chunk_is_resident_by_then() -> None:
    composition = composed((1, 1), (1, 1), mode=ReuseMode.INDEPENDENT)
    assert composition.chunks[0].key == composition.chunks[1].key
    told(Worker({}), Store(), composition)
    assert sources(composition) == [KVSource.COMPUTED, KVSource.DEVICE]


def test_a_bypass_asks_nobody() -> None:
    composition = composed((1, 1), (2,))
    key = composition.chunks[0].key
    found = told(Worker({key: 1}, hangs=True), Store(key), composition, bypass=True)
    assert sources(composition) == [KVSource.COMPUTED] * 2 and composition.cached_tokens == 0
    assert found.nbytes_to_compute == LAYOUT.nbytes(4) and found.nbytes_to_load == found.nbytes_shared == 0


def test_a_device_thread_that_does_not_look_is_not_waited_for_long(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SNAPSHOT_S", 0.01)
    with pytest.raises(TimeoutError, match="device thread is busy"):
        told(Worker({}, hangs=True), Store(), composed((1,)))
