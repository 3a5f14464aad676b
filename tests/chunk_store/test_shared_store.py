"""Ledger and blobs made one store: the order of steps, and what a failure between two of them leaves."""

from __future__ import annotations

import pytest

from chunk_store.entry import MissReason
from chunk_store.errors import BlobUnreadable, ClaimLost, NoSpace, StoreError, StoreFull, StoreUnavailable
from chunk_store.store import Busy, Publication, Stored
from tests.chunk_store.contract import blank, loads, publish, sample, views_of
from tests.chunk_store.places import FilePlace

ENTRY = sample(1)


def claimed(answer: Publication | Stored | Busy) -> Publication:
    assert not isinstance(answer, Stored | Busy)
    return answer


def test_a_publication_is_written_once_then_committed_and_then_over(file_place: FilePlace) -> None:
    publication = claimed(file_place.open().begin(ENTRY.key))
    with pytest.raises(StoreError, match="commit needs write"):
        publication.commit()
    with pytest.raises(ValueError, match="is not the claimed key"):
        publication.write(sample(2).header, sample(2).views)
    publication.write(ENTRY.header, ENTRY.views)
    with pytest.raises(StoreError, match="already called"):
        publication.write(ENTRY.header, ENTRY.views)
    publication.commit()
    publication.abort()
    with pytest.raises(ClaimLost, match="has ended"):
        publication.renew()


def test_leaving_without_a_commit_leaves_nothing(file_place: FilePlace) -> None:
    store = file_place.open()
    with claimed(store.begin(ENTRY.key)) as publication:
        publication.write(ENTRY.header, ENTRY.views)
    assert list(store.blobs.names()) == [] and store.ledger.claims.unfinished() == []


def test_an_error_under_way_is_told_even_where_the_claim_cannot_be_dropped(
    file_place: FilePlace, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = file_place.open()

    def away(*_: object) -> bool:
        raise StoreUnavailable("away")

    monkeypatch.setattr(store.ledger.claims, "drop", away)
    with pytest.raises(KeyError), claimed(store.begin(ENTRY.key)):
        raise KeyError
    with pytest.raises(StoreUnavailable), claimed(store.begin(sample(2).key)):
        pass
    store.close()


def test_a_full_medium_evicts_as_often_as_it_helps(file_place: FilePlace, monkeypatch: pytest.MonkeyPatch) -> None:
    store = file_place.open()
    publish(store, sample(2))
    real, refusals = store.blobs.write, [NoSpace("full")]

    def write(*arguments: object) -> None:
        if refusals:
            raise refusals.pop()
        real(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(store.blobs, "write", write)
    publish(store, ENTRY)
    assert loads(store, ENTRY) and not loads(store, sample(2))
    refusals += [NoSpace("full")] * 9
    with pytest.raises(StoreFull, match="medium"):
        publish(store, sample(3))


def test_a_read_error_is_a_miss_that_keeps_the_entry(file_place: FilePlace, monkeypatch: pytest.MonkeyPatch) -> None:
    store = file_place.open()
    publish(store, ENTRY)

    def unreadable(*_: object) -> None:
        raise BlobUnreadable("input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(store.blobs, "read", unreadable)
        assert store.load(ENTRY.key, ENTRY.header.token_ids, views_of(blank(ENTRY))) is MissReason.LOAD_FAILED
    assert loads(store, ENTRY)


def test_an_entry_that_is_replaced_while_it_is_read_is_read_again(
    file_place: FilePlace, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, other = file_place.open(), file_place.open()
    publish(store, ENTRY)
    real = store.blobs.read

    def read(*arguments: object) -> None:
        if store.blobs.read is not real:
            monkeypatch.setattr(store.blobs, "read", real)
            other.delete_chunks([ENTRY.chunk_id])
            publish(other, ENTRY)
        real(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(store.blobs, "read", read)
    assert loads(store, ENTRY)


def test_closing_aborts_what_was_begun(file_place: FilePlace) -> None:
    store, other = file_place.open(), file_place.open()
    publication = claimed(store.begin(ENTRY.key))
    assert isinstance(other.begin(ENTRY.key), Busy)
    store.close()
    with pytest.raises(ClaimLost):
        publication.commit()
    publish(other, ENTRY)


def test_a_released_lease_is_not_renewed(file_place: FilePlace) -> None:
    store = file_place.open()
    publish(store, ENTRY)
    with store.lease([ENTRY.key]) as lease:
        lease.renew()
    lease.release()
    with pytest.raises(StoreError, match="released"):
        lease.renew()
