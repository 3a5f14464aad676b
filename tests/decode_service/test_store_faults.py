"""Stored KV that is bad, gone or evicted: a miss with a reason, counted and reported, and the right answer."""

from __future__ import annotations

import os
import shutil
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, cast

import pytest

import cairn
from cairn import Result
from chunk_store.store import ChunkStore
from decode_service.kv_source.asking import FetchTerms
from decode_service.kv_source.fetcher import KVFetcher
from decode_service.prompt.composition import Composition
from tests.decode_service.models import loaded, tokens
from tests.decode_service.pair import Pair, pair, wait_until

PARTS = [tokens(1, 40), tokens(2, 20), [5]]


@pytest.fixture
def store(tmp_path: Path) -> Path:
    return tmp_path / "store"


@pytest.fixture
def fresh(folder: Path, store: Path) -> Iterator[Pair]:
    with pair(loaded(folder, "prefill"), loaded(folder, "decode"), store) as services:
        yield services
        services.check_idle()


def corrupt(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 7)


def empty(path: Path) -> None:
    os.truncate(path, 0)


DAMAGE: dict[Callable[[Path], None], str] = {
    corrupt: "verify_failed",
    truncate: "verify_failed",
    empty: "verify_failed",
    os.unlink: "load_failed",
}


def lose(services: Pair) -> None:
    """Makes both services forget what is in their pools."""
    services.forget()
    residents = services.prefill_pool.residents
    for key in list(residents._chunks):
        residents.evict(key)


@pytest.mark.parametrize("damage", DAMAGE, ids=lambda damage: damage.__name__)
def test_damaged_entries_are_computed_anew(fresh: Pair, store: Path, damage: Callable[[Path], None]) -> None:
    first = fresh.generate(PARTS, logprobs=True)
    files = list(store.glob("data/*/*"))
    assert len(files) == 2
    lose(fresh)
    for path in files:
        damage(path)
    again = fresh.generate(PARTS, logprobs=True)
    reason = DAMAGE[damage]
    assert (again.token_ids, again.logprobs) == (first.token_ids, first.logprobs)
    assert again.reuse.segments[0].miss_reason == reason
    assert again.usage.computed_tokens == again.usage.prompt_tokens
    assert fresh.metric("cairn_cache_misses_total", reason=reason) >= 1
    lose(fresh)
    reloaded = fresh.generate(PARTS, logprobs=True)
    assert [segment.source for segment in reloaded.reuse.segments[:2]] == ["store"] * 2
    assert (reloaded.token_ids, reloaded.logprobs) == (first.token_ids, first.logprobs)


def test_the_store_directory_vanishes(fresh: Pair, store: Path) -> None:
    first = fresh.generate(PARTS)
    shutil.rmtree(store)
    assert fresh.generate(PARTS).token_ids == first.token_ids
    assert not store.exists()  # nobody was asked for what is resident
    lose(fresh)
    again = fresh.generate(PARTS)
    assert again.token_ids == first.token_ids
    assert again.reuse.segments[0].source == "computed"
    assert len(list(store.glob("data/*/*"))) == 2
    with pytest.raises(cairn.NotFound):
        fresh.generate([cairn.ChunkRef("0" * 64), [5]])


def test_the_store_cannot_be_written(fresh: Pair, store: Path) -> None:
    """A file stands where the directory was: what is missing is computed here, and only unknown ids are refused."""
    first = fresh.generate(PARTS)
    ids = [fresh.client.prefill(part, durable=True) for part in PARTS[:1]]
    shutil.rmtree(store)
    store.write_text("in the way")
    new = [tokens(3, 20), [5]]
    expected = fresh.generate(new, cache="bypass", logprobs=True)
    computed = fresh.generate(new, logprobs=True)
    assert (computed.token_ids, computed.logprobs) == (expected.token_ids, expected.logprobs)
    assert computed.reuse.segments[0].unpublished == "store_unavailable"
    assert fresh.generate(new).reuse.segments[0].source == "device"
    assert fresh.metric("cairn_unpublished_chunks_total", reason="store_unavailable") == 1
    for parts in (PARTS, [ids[0], *PARTS[1:]]):
        resident = fresh.generate(parts)
        assert resident.token_ids == first.token_ids
        assert resident.reuse.segments[0].source == "device"
    with pytest.raises(cairn.CairnError):
        fresh.generate([cairn.ChunkRef("0" * 64), [5]], timeout_s=20)
    store.unlink()
    assert fresh.generate(PARTS).token_ids == first.token_ids


def test_evicted_from_a_small_store(folder: Path, store: Path) -> None:
    """The store holds about three entries of 40 tokens; whatever goes, answers stay and the reason is known."""
    nbytes = loaded(folder, "decode").served.layout.nbytes(40)
    with pair(
        loaded(folder, "prefill"), loaded(folder, "decode"), store, store_capacity=4 * nbytes, kv_pages=40
    ) as services:
        chunks = [tokens(10 + index, 40) for index in range(8)]
        first = [services.generate([chunk, [5]]) for chunk in chunks]
        lose(services)
        again = [services.generate([chunk, [5]]) for chunk in chunks]
        assert [result.token_ids for result in again] == [result.token_ids for result in first]
        assert "evicted" in {result.reuse.segments[0].miss_reason for result in again}
        assert services.metric("cairn_cache_misses_total", reason="evicted") > 0
        results = services.together([[chunk, [5]] for chunk in chunks * 3], reuse="independent")
        assert [result.token_ids for result in results] == [result.token_ids for result in first * 3]
        assert services.client.stats().leased_entries == 0
        services.check_idle()


class Rival:
    """A store that another worker fills to the brim whenever a chunk has just been computed."""

    def __init__(self, store: ChunkStore, capacity: int) -> None:
        self.store = store
        self.capacity = capacity
        self.evicted = 0

    def press(self) -> None:
        """Evicts everything that nothing protects."""
        self.evicted += len(cast(Any, self.store).ledger.claims.evict(self.capacity))


def test_what_was_just_computed_is_not_evicted_before_it_is_loaded(fresh: Pair, store: Path) -> None:
    """Between two chunks of one request everything unprotected goes: what was made before must be leased."""
    source: KVFetcher = fresh.decode.worker.loader.source
    rival = Rival(source.store, 1 << 30)
    compute_all, asked = source.prefill_client.compute_all, []

    def press(composition: Composition, indices: Sequence[int], terms: FetchTerms) -> Any:
        asked.append(list(indices))
        for made in compute_all(composition, indices, terms):
            yield made
            rival.press()

    source.prefill_client.compute_all = press
    documents = [tokens(30 + index, 20) for index in range(4)]
    result = fresh.generate([*documents, [5]], reuse="independent")
    assert asked == [[0, 1, 2, 3]]  # once: nothing had to be computed again
    assert {segment.miss_reason for segment in result.reuse.segments[:4]} == {"not_stored"}


def test_a_lease_is_kept_while_another_chunk_is_computed(fresh: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    """A slow prefill outlives the lease on what was found: it is renewed meanwhile."""
    source: KVFetcher = fresh.decode.worker.loader.source
    found = tokens(40, 20)
    fresh.generate([found, [5]], reuse="independent")
    lose(fresh)
    monkeypatch.setattr("serving.store.heartbeat.heartbeat.__wrapped__.__defaults__", (0.05,))
    lease = source.store.lease
    monkeypatch.setattr(source.store, "lease", lambda keys, **options: lease(keys, ttl_s=2.0, **options))
    with fresh.held_prefill():
        results: list[Result] = []
        thread = threading.Thread(
            target=lambda: results.append(fresh.generate([found, tokens(41, 20), [5]], reuse="independent"))
        )
        thread.start()
        wait_until(lambda: fresh.client.loads().running == 1)
        threading.Event().wait(2.5)
        cast(Any, source.store).ledger.claims.evict(1 << 30)
    thread.join(60)
    assert [segment.source for segment in results[0].reuse.segments] == ["store", "computed", "computed"]
