"""Missing chunks are claimed in a real store by who computes them, each once, and published behind."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from chunk_store.key import ChunkId, ChunkKey, ChunkType
from chunk_store.landing import Buffers
from chunk_store.store import Busy, Publication, Stored
from chunk_store.tenant import DEFAULT_TENANT, NO_LIMITS, TenantLimits
from decode_service.kv_source import claims as claims_module
from decode_service.kv_source.asking import ComputedChunk, FetchTerms
from decode_service.kv_source.claims import ChunkClaims, StoreClaim
from decode_service.prompt.composition import Composition
from decode_service.prompt.request_chunk import RequestChunk, Segment, Unpublished
from engine.reuse import ReuseMode
from serving.errors import Cancelled, Overloaded, Unavailable
from tests.fakes import LAYOUT, MODEL
from tests.serving.publishing.queue_for_tests import NBYTES, TOKENS, WAIT_S, Queue

TERMS = FetchTerms("")


def composition(*names: str, exact: bool = True) -> Composition:
    """Chunks of the same number of tokens, each under all before it if ``exact``."""
    chunks = tuple(
        RequestChunk(
            *(index, Segment(ChunkId(name), ChunkType.CONTEXT, (index + 1,) * TOKENS), key_of(names, index, exact)),
            *(tuple(range(index)) if exact else (), 0, DEFAULT_TENANT),
            visible=TOKENS,
        )
        for index, name in enumerate(names)
    )
    return Composition(chunks, None, ReuseMode.EXACT, ())


def key_of(names: tuple[str, ...], index: int, exact: bool) -> ChunkKey:
    whole = "".join(names[: index + 1]) if exact else names[index]
    return ChunkKey(whole.encode().hex().ljust(64, "0"))


class Here(Queue):
    """The store, a publisher, and claims over both."""

    def __init__(
        self, root: Path, *, room: int = 8, limits: TenantLimits = NO_LIMITS, staged: int | None = None
    ) -> None:
        super().__init__(root, room=room, staged=staged)
        self.claims = ChunkClaims(self.store, self.publisher, MODEL, LAYOUT, lambda _: limits)

    def compute_claimed(self, wanted: Composition, made: ComputedChunk) -> StoreClaim:
        """Fills a claimed chunk's pages and hands it on, in the device thread."""
        claim, chunk = made.claim, wanted.chunks[made.index]
        assert isinstance(claim, StoreClaim)

        def launch() -> None:
            resident = self.residents.reserve(chunk.key, TOKENS)
            resident.ready = True
            claim.publish(resident)
            self.residents.release(resident)

        self.device.submit(launch).result(WAIT_S)
        return claim

    def close(self) -> None:
        self.claims.stop()
        super().close()

    def are_stored(self, *chunks: RequestChunk) -> list[bool]:
        return [info is not None for info in self.store.lookup([chunk.key for chunk in chunks])]

    def begin(self, chunk: RequestChunk) -> Publication | Stored | Busy:
        """As another process does."""
        return self.store.begin(chunk.key)


@pytest.fixture
def here(tmp_path: Path) -> Iterator[Here]:
    made = Here(tmp_path)
    yield made
    made.publisher.stop(WAIT_S)
    made.claims.stop()
    made.device.shutdown()
    made.store.close()


def test_what_is_missing_is_claimed_in_order_and_stored_when_it_is_computed(here: Here) -> None:
    wanted = composition("a", "b", "c")
    made = list(here.claims.compute_all(wanted, [0, 1, 2], TERMS))
    assert [(each.index, each.durable, each.unpublished) for each in made] == [(n, False, None) for n in range(3)]
    assert all(isinstance(here.begin(chunk), Busy) for chunk in wanted.chunks)
    going = [here.compute_claimed(wanted, each).going() for each in made]
    headers = [future.result(WAIT_S) for future in going]
    assert here.are_stored(*wanted.chunks) == [True] * 3 and not here.claims._open
    assert [info.key for info in headers] == [chunk.key for chunk in wanted.chunks]
    assert [each.claim for each in here.claims.compute_all(wanted, [0, 1, 2], TERMS)] == [None] * 3
    assert here.publisher.room.taken == 0


@pytest.mark.parametrize("exact", [True, False])
def test_what_another_process_computes_is_waited_for_and_holds_up_only_what_attends_to_it(
    here: Here, exact: bool
) -> None:
    wanted = composition("a", "b", "c", exact=exact)
    other = here.begin(wanted.chunks[1])
    found = here.claims.compute_all(wanted, [0, 1, 2], TERMS)
    first = next(found)
    assert first.index == 0 and first.claim is not None
    with ThreadPoolExecutor(1) as threads:
        if not exact:
            third = next(found)
            assert third.index == 2 and third.claim is not None
        rest = threads.submit(list, found)
        time.sleep(0.1)
        assert not rest.done() and len(here.claims._open) == (1 if exact else 2)
        assert not isinstance(other, Stored | Busy)
        other.abort()  # it has died: then the chunk is ours
        assert [(each.index, each.claim is not None) for each in rest.result(WAIT_S)] == (
            [(1, True), (2, True)] if exact else [(1, True)]
        )


def test_a_claim_that_nobody_computes_is_free_for_others_soon(here: Here) -> None:
    wanted = composition("a")
    (made,) = here.claims.compute_all(wanted, [0], TERMS)
    assert isinstance(made.claim, StoreClaim)
    made.claim.drop()
    for _ in range(1000):
        again = here.begin(wanted.chunks[0])
        if not isinstance(again, Busy):
            break
        time.sleep(0.01)
    assert not isinstance(again, Busy | Stored) and here.publisher.room.taken == 0
    assert made.claim.going().exception() is not None


def test_nobody_is_waited_for_whom_nobody_needs(here: Here) -> None:
    wanted, gone = composition("a"), threading.Event()
    other = here.begin(wanted.chunks[0])
    with ThreadPoolExecutor(1) as threads:
        waiting = threads.submit(list, here.claims.compute_all(wanted, [0], FetchTerms("", abandoned=gone.is_set)))
        gone.set()
        with pytest.raises(Cancelled):
            waiting.result(WAIT_S)
    with pytest.raises(Unavailable, match="another process"):
        list(here.claims.compute_all(wanted, [0], FetchTerms("", deadline=time.monotonic())))
    assert not isinstance(other, Busy)


def test_a_store_without_room_for_a_tenant_is_left_alone_for_a_while(tmp_path: Path) -> None:
    here = Here(tmp_path, limits=TenantLimits(nbytes=NBYTES // 2))
    wanted = composition("a", "b")
    first, second = here.claims.compute_all(wanted, [0, 1], TERMS)
    assert here.compute_claimed(wanted, first).going().exception(WAIT_S) is not None
    second.claim.drop()
    (refused,) = here.claims.compute_all(wanted, [1], TERMS)
    assert refused.unpublished is Unpublished.STORE_FULL
    insisting = FetchTerms("", insist=True)
    for _ in range(1000):
        if (made := next(iter(here.claims.compute_all(wanted, [0], insisting)))).claim is not None:
            break
    assert made.unpublished is None
    here.claims.stop()


def test_a_store_that_does_not_keep_up_is_waited_for_and_then_done_without(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(claims_module, "ROOM_WAIT_S", 0.2)
    here = Here(tmp_path, room=1)
    wanted = composition("a", "b", "c", exact=False)
    found = list(here.claims.compute_all(wanted, [0, 1, 2], TERMS))
    assert [each.unpublished for each in found] == [None, None, Unpublished.STORE_UNAVAILABLE]
    going = [here.compute_claimed(wanted, each).going() for each in found[:2]]
    assert all(each.result(WAIT_S) for each in going)
    assert next(iter(here.claims.compute_all(wanted, [2], TERMS))).claim is not None
    here.claims.stop()


@contextmanager
def writes_held(here: Here, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What is being written, and what comes, goes on when the block ends."""
    write, let_on = here.store.blobs.write, threading.Event()

    def held(*given: Any) -> None:
        assert let_on.wait(WAIT_S)
        write(*given)

    monkeypatch.setattr(here.store.blobs, "write", held)
    try:
        yield
    finally:
        let_on.set()


def test_an_answer_does_not_wait_for_a_slow_store_and_its_chunks_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The queue is full, and as much may wait for room in the pool: claimed, computed, stored when there is room."""
    monkeypatch.setattr(claims_module, "ROOM_WAIT_S", WAIT_S)  # who waited would not come back in time
    here = Here(tmp_path, room=2)
    wanted = composition("a", "b", "c", "d", exact=False)
    with writes_held(here, monkeypatch):
        found = list(here.claims.compute_all(wanted, [0, 1, 2, 3], FetchTerms("", deadline=time.monotonic() + 5.0)))
        assert [each.unpublished for each in found] == [None] * 4
        going = [here.compute_claimed(wanted, each).going() for each in found]
        assert all(each.computed.result(WAIT_S) is None for each in going)
        assert not any(each.done() for each in going) and here.publisher.room.taken == 2 * NBYTES
        assert here.value("cairn_publication_queue_bytes") == 4 * NBYTES
        assert [here.device.submit(here.residents.find, chunk.key).result().holders for chunk in wanted.chunks] == [
            *(1, 1, 0, 0)
        ], "what waits for room keeps nobody from using its pages"
        assert all(isinstance(here.begin(chunk), Busy) for chunk in wanted.chunks)
    assert all(each.result(WAIT_S) for each in going) and here.are_stored(*wanted.chunks) == [True] * 4
    here.idle()
    here.close()


def test_what_left_the_pool_before_there_was_room_is_computed_anew_by_who_needs_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its claim is this process's own: nobody waits until the queue comes to it."""
    here = Here(tmp_path, room=1)
    wanted = composition("a", "b", exact=False)
    with writes_held(here, monkeypatch):
        found = list(here.claims.compute_all(wanted, [0, 1], TERMS))
        first, gone = (here.compute_claimed(wanted, each).going() for each in found)
        assert here.device.submit(here.residents.evict, wanted.chunks[1].key).result(WAIT_S)
        again = next(iter(here.claims.compute_all(wanted, [1], FetchTerms("", deadline=time.monotonic() + WAIT_S))))
        assert again.claim is not None and isinstance(gone.exception(WAIT_S), Overloaded)
        assert here.failures("queue_full") == 1
        new = here.compute_claimed(wanted, again).going()
    assert first.result(WAIT_S) and new.result(WAIT_S) and here.are_stored(*wanted.chunks) == [True] * 2
    here.close()


def test_what_waits_in_memory_to_be_written_is_read_from_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its pages have gone, and the store will take its time: nobody waits for that."""
    here = Here(tmp_path, staged=2)
    wanted = composition("a")
    with writes_held(here, monkeypatch):
        (made,) = here.claims.compute_all(wanted, [0], TERMS)
        going = here.compute_claimed(wanted, made).going()
        for _ in range(1000):
            if here.device.submit(here.residents.evict, wanted.chunks[0].key).result(WAIT_S):
                break
            time.sleep(0.005)
        (again,) = here.claims.compute_all(wanted, [0], FetchTerms("", deadline=time.monotonic() + WAIT_S))
        target = Buffers([memoryview(bytearray(size)) for size in LAYOUT.plane_nbytes(TOKENS)])
        assert again.claim is None and not again.durable and again.read is not None and again.read(target)
    assert going.result(WAIT_S) and not again.read(target)
    here.close()


def test_a_claim_that_is_dropped_waits_for_room_no_more(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here = Here(tmp_path, room=1)
    wanted = composition("a", "b", "c", exact=False)
    with writes_held(here, monkeypatch):
        found = list(here.claims.compute_all(wanted, [0, 1], TERMS))
        here.compute_claimed(wanted, found[0])
        assert isinstance(found[1].claim, StoreClaim)
        found[1].claim.drop()
        assert here.publisher.room.waiting == 0
        (third,) = here.claims.compute_all(wanted, [2], TERMS)
        assert third.claim is not None
        going = here.compute_claimed(wanted, third).going()
    assert going.result(WAIT_S)
    here.close()
