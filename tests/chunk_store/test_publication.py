"""One entry on its way into a store: the order of steps, and what a failure between two of them leaves."""

from __future__ import annotations

import pytest

from chunk_store.errors import ClaimLost, NoSpace, StoreError, StoreFull, StoreUnavailable
from tests.chunk_store.contract import loads, publish, sample
from tests.chunk_store.places import FilePlace
from tests.chunk_store.test_shared_store import ENTRY, claimed


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
