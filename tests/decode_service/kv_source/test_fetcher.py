"""KV that is not resident: loaded from the store, asked for, or left to whoever asked. No prefill service, no pool."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from chunk_store.entry import EntryHeader, MissReason
from chunk_store.errors import StoreError, StoreFull, StoreUnavailable
from chunk_store.key import ChunkKey
from chunk_store.landing import Buffers, Landing
from chunk_store.open import open_store
from chunk_store.store import Busy, Stored
from decode_service.kv_source.asking import ComputedChunk, FetchTerms, NoRoomToAsk, Wanted
from decode_service.kv_source.fetcher import KVFetcher
from decode_service.prompt.composition import Composition
from decode_service.prompt.request_chunk import RequestChunk, Unpublished
from engine.kv.source import KVSource
from engine.reuse import ReuseMode
from serving.errors import NotFound, Unavailable, Unsupported
from tests.decode_service.prompts import composed
from tests.fakes import LAYOUT, MODEL

ANYBODY = FetchTerms(salt="")


class Memory:
    """Memory of a chunk; ``held``: the host tier has it."""

    def __init__(self, chunk: RequestChunk, held: bool = False) -> None:
        self.buffers = [memoryview(bytearray(size)) for size in LAYOUT.plane_nbytes(len(chunk.token_ids))]
        self.held = held
        self.filled = 0

    def fill(self, read: Callable[[Landing], Any]) -> tuple[KVSource, Any]:
        self.filled += 1
        return (KVSource.HOST, None) if self.held else (KVSource.STORE, read(Buffers(self.buffers)))

    @property
    def first_byte(self) -> int:
        return int(self.buffers[0][0])


class Desk:
    """A source over a file store; the prefill service is a function that publishes."""

    def __init__(self, root: Path) -> None:
        self.store: Any = open_store(f"file://{root}")
        self.asked: list[list[int]] = []
        self.registered = 0
        self.answer: Callable[[Composition, int], ChunkKey | Unpublished] = self.publishes
        self.source = KVFetcher(self.store, self, MODEL, self.register)

    def register(self, composition: Composition) -> None:
        self.registered += 1

    def compute_all(
        self, composition: Composition, indices: Sequence[int], terms: FetchTerms
    ) -> Iterator[ComputedChunk]:
        self.asked.append(list(indices))
        for index in indices:
            answer = self.answer(composition, index)
            if isinstance(answer, Unpublished):
                yield ComputedChunk(index, composition.chunks[index].key, durable=False, unpublished=answer)
            else:
                yield ComputedChunk(index, answer)

    def publishes(self, composition: Composition, index: int) -> ChunkKey | Unpublished:
        for each in (*composition.chunks[index].context, index):
            self.put(composition.chunks[each])
        return composition.chunks[index].key

    def put(self, chunk: RequestChunk) -> None:
        publication = self.store.begin(chunk.key)
        if isinstance(publication, Stored):
            return
        assert not isinstance(publication, Busy)
        with publication:
            header = EntryHeader(chunk.key, chunk.segment.chunk_id, MODEL, LAYOUT, chunk.token_ids, ())
            sizes = LAYOUT.plane_nbytes(len(chunk.token_ids))
            publication.write(header, [memoryview(bytearray([chunk.token_ids[0]]) * size) for size in sizes])
            publication.commit()

    def fetch(self, composition: Composition, *, held: Sequence[int] = (), terms: FetchTerms = ANYBODY) -> list[Wanted]:
        wanted: Any = [Wanted(chunk, Memory(chunk, chunk.index in held)) for chunk in composition.chunks]  # type: ignore[arg-type]
        spent = self.source.fetch(composition, wanted, terms)
        assert set(spent) == {"lookup", "prefill", "load"} and all(ns >= 0 for ns in spent.values())
        return list(wanted)


def outcomes(wanted: Sequence[Wanted]) -> list[tuple[Any, Any, Any]]:
    return [(w.outcome.source, w.outcome.miss_reason, w.outcome.unpublished) for w in wanted if w.outcome]


@pytest.fixture
def desk(tmp_path: Path) -> Iterator[Desk]:
    made = Desk(tmp_path)
    yield made
    made.store.close()


def test_what_is_stored_is_loaded_and_nobody_is_asked(desk: Desk) -> None:
    composition = composed((3, 3), (4,))
    for chunk in composition.chunks:
        desk.put(chunk)
    wanted = desk.fetch(composition)
    assert outcomes(wanted) == [(KVSource.STORE, None, None)] * 2 and not desk.asked and not desk.registered
    memories: Any = [want.memory for want in wanted]
    assert [memory.first_byte for memory in memories] == [3, 4]


@pytest.mark.parametrize("mode", ReuseMode)
def test_all_missing_chunks_are_asked_for_in_one_call(desk: Desk, mode: ReuseMode) -> None:
    wanted = desk.fetch(composed((3,), (4,), (5,), mode=mode))
    assert desk.asked == [[0, 1, 2]] and desk.registered == 1
    assert outcomes(wanted) == [(KVSource.COMPUTED, MissReason.NOT_STORED, None)] * 3


def test_what_is_stored_is_not_asked_for(desk: Desk) -> None:
    composition = composed((3,), (4,), (5,), mode=ReuseMode.INDEPENDENT)
    desk.put(composition.chunks[1])
    wanted = desk.fetch(composition)
    assert desk.asked == [[0, 2]]
    assert [source for source, _, _ in outcomes(wanted)] == [KVSource.COMPUTED, KVSource.STORE, KVSource.COMPUTED]


def test_what_the_host_has_needs_no_store(desk: Desk) -> None:
    wanted = desk.fetch(composed((3,), (4,), mode=ReuseMode.INDEPENDENT), held=[0])
    assert desk.asked == [[1]] and [source for source, _, _ in outcomes(wanted)] == [KVSource.HOST, KVSource.COMPUTED]


def test_what_cannot_be_read_is_computed_anew_once(desk: Desk, tmp_path: Path) -> None:
    composition = composed((3,))
    desk.put(composition.chunks[0])
    (path,) = (path for path in tmp_path.glob("data/**/*") if path.is_file())
    path.write_bytes(path.read_bytes()[:-1] + b"\xff")
    wanted = desk.fetch(composition)
    assert desk.asked == [[0]] and outcomes(wanted) == [(KVSource.COMPUTED, MissReason.VERIFY_FAILED, None)]


def test_what_was_computed_and_still_is_not_there_is_said(desk: Desk) -> None:
    desk.answer = lambda composition, index: composition.chunks[index].key  # says so, and stores nothing
    with pytest.raises(Unavailable, match=r"segments\[0\]: its KV was computed but cannot be loaded .*try again"):
        desk.fetch(composed((3,)))


def test_what_could_not_be_stored_is_left_to_who_asked_and_not_asked_for_again_soon(
    desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    desk.answer = lambda composition, index: Unpublished.STORE_FULL
    left = (KVSource.COMPUTED, MissReason.NOT_STORED, Unpublished.STORE_FULL)
    assert outcomes(desk.fetch(composed((3,), (4,)))) == [left] * 2 and desk.asked == [[0, 1]]
    assert outcomes(desk.fetch(composed((5,)))) == [left] and desk.asked == [[0, 1]], "it is known to be full"
    desk.answer = desk.publishes
    desk.fetch(composed((5,), salt="another tenant"))
    assert desk.asked == [[0, 1], [0]], "to that tenant"
    later = time.monotonic() + 60
    monkeypatch.setattr("decode_service.kv_source.fetcher.time.monotonic", lambda: later)
    assert outcomes(desk.fetch(composed((5,))))[0][2] is None


def test_without_room_to_ask_nothing_is_asked_and_what_is_stored_needs_none(desk: Desk) -> None:
    composition = composed((3,))
    refused = FetchTerms("", may_ask=lambda: False)
    with pytest.raises(NoRoomToAsk):
        desk.fetch(composition, terms=refused)
    assert not desk.asked and not desk.registered
    desk.put(composition.chunks[0])
    assert outcomes(desk.fetch(composition, terms=refused)) == [(KVSource.STORE, None, None)]


def test_content_that_was_displaced_is_registered_again_a_few_times(desk: Desk) -> None:
    def displaced(composition: Composition, index: int) -> ChunkKey | Unpublished:
        raise NotFound("displaced")

    desk.answer = displaced
    wanted = desk.fetch(composed((3,)))
    assert desk.asked == [[0]] * 3 and desk.registered == 3
    assert outcomes(wanted) == [(KVSource.COMPUTED, MissReason.NOT_STORED, Unpublished.STORE_FULL)]


def test_another_model_identity_is_refused_with_the_remedy(desk: Desk) -> None:
    other = composed((9, 9)).chunks[0].key
    desk.answer = lambda composition, index: other
    with pytest.raises(Unsupported, match=r"another model identity.*same model and options"):
        desk.fetch(composed((3,)))


@pytest.mark.parametrize(
    ("error", "why"),
    [(StoreUnavailable("gone"), Unpublished.STORE_UNAVAILABLE), (StoreFull("full"), Unpublished.STORE_FULL)],
)
def test_a_store_of_no_use_leaves_all_but_what_the_host_has(
    desk: Desk, monkeypatch: pytest.MonkeyPatch, error: StoreError, why: Unpublished
) -> None:
    def fails(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(desk.store, "lookup", fails)
    wanted = desk.fetch(composed((3,), (4,)), held=[1])
    assert outcomes(wanted) == [(KVSource.COMPUTED, MissReason.LOAD_FAILED, why), (KVSource.HOST, None, None)]


def test_a_full_registry_leaves_what_is_missing_and_loads_what_is_stored(desk: Desk) -> None:
    def full(composition: Composition) -> None:
        raise StoreFull("no more chunks")

    desk.source.register = full
    composition = composed((3,), (4,), mode=ReuseMode.INDEPENDENT)
    desk.put(composition.chunks[0])
    wanted = desk.fetch(composition)
    assert outcomes(wanted)[0][0] is KVSource.STORE and not desk.asked
    assert outcomes(wanted)[1] == (KVSource.COMPUTED, MissReason.NOT_STORED, Unpublished.STORE_FULL)


def test_another_fault_of_the_store_is_unavailable(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object, **__: object) -> None:
        raise StoreError("odd")

    monkeypatch.setattr(desk.store, "lookup", fails)
    with pytest.raises(Unavailable, match="chunk store: odd"):
        desk.fetch(composed((3,)))


def test_a_lease_that_cannot_be_had_is_not_waited_for_again_soon(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    waited: list[int] = []

    def locked(*_: object, **__: object) -> None:
        waited.append(1)
        raise StoreUnavailable("locked")

    monkeypatch.setattr(desk.store, "lease", locked)
    composition = composed((3,))
    desk.put(composition.chunks[0])
    for _ in range(3):
        assert outcomes(desk.fetch(composition)) == [(KVSource.STORE, None, None)], "what is stored is read without"
    assert len(waited) == 1


@pytest.mark.parametrize("there", [True, False])
def test_what_waits_here_to_be_written_is_copied_or_else_taken_from_the_store(
    desk: Desk, monkeypatch: pytest.MonkeyPatch, there: bool
) -> None:
    """What is no longer in memory was written meanwhile."""
    composition = composed((3,))

    def read(landing: Landing) -> bool:
        if not there:
            desk.put(composition.chunks[0])
            return False
        with landing.piece(0, sum(landing.sizes)) as views:
            for view in views:
                view[:] = bytes([3]) * view.nbytes
        return True

    def at_hand(asked: Composition, indices: Sequence[int], terms: FetchTerms) -> Iterator[ComputedChunk]:
        for index in indices:
            yield ComputedChunk(index, asked.chunks[index].key, durable=False, read=read)

    monkeypatch.setattr(desk, "compute_all", at_hand)
    (want,) = desk.fetch(composition)
    source, missed = (KVSource.HOST, None) if there else (KVSource.COMPUTED, MissReason.NOT_STORED)
    assert outcomes([want]) == [(source, missed, None)]
    assert want.memory.first_byte == 3  # type: ignore[attr-defined]
