"""Ledger and blobs made one store: the order of steps, and what a failure between two of them leaves."""

from __future__ import annotations

import pytest

from chunk_store.entry import MissReason
from chunk_store.errors import BlobUnreadable, ClaimLost, StoreError
from chunk_store.store import Busy, Publication, Stored
from tests.chunk_store.contract import blank, loads, publish, sample, views_of
from tests.chunk_store.places import FilePlace

ENTRY = sample(1)


def claimed(answer: Publication | Stored | Busy) -> Publication:
    assert not isinstance(answer, Stored | Busy)
    return answer


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
