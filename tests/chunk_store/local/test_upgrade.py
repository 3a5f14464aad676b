"""Each older index still opens, with all that was in it."""

from __future__ import annotations

import shutil
import sqlite3
from contextlib import closing
from pathlib import Path

import pytest

from chunk_store.entry import MissReason
from chunk_store.errors import StoreTooNew
from chunk_store.format.versions import INDEX_VERSION
from chunk_store.local.upgrade import MIGRATIONS
from chunk_store.tenant import DEFAULT_TENANT
from tests.chunk_store.contract import MODEL, loads, publish, sample
from tests.chunk_store.places import FilePlace
from tests.chunk_store.test_contract_tenants import A, seen, usage


def test_there_is_a_way_from_every_version() -> None:
    assert sorted(MIGRATIONS) == list(range(1, INDEX_VERSION))


def test_an_index_that_does_not_count_uses_is_upgraded(file_place: FilePlace) -> None:
    """Version 3 had neither the table nor the trigger."""
    entry = sample(1)
    with closing(file_place.open()) as store:
        store.put_records([entry.record(name="kept")])
        publish(store, entry)
    with closing(sqlite3.connect(file_place.root / "index.sqlite", isolation_level=None)) as index:
        for statement in ("DROP TRIGGER uses_out", "DROP TABLE uses", "PRAGMA user_version = 3"):
            index.execute(statement)
    again = file_place.open()
    assert loads(again, entry) and again.uses([entry.chunk_id]) == [0]
    again.note_uses([entry.chunk_id])
    again.sweep()
    assert file_place.open().uses([entry.chunk_id]) == [1]
    again.delete_chunks([entry.chunk_id])
    assert file_place.open().uses([entry.chunk_id]) == [0] and again.ledger.upkeep.audit() == []


def test_an_index_of_before_tenants_is_upgraded(file_place: FilePlace, file_place_2: FilePlace) -> None:
    """``golden/index-v1.sql`` is what the software of version 1 made; its data is made here."""
    plain, child, gone = sample(1), sample(2, context=[sample(1).key]), sample(3)
    salted = sample(1, salt="a")
    under = sample(4, context=[salted.key], salt="a")
    made = file_place_2.open()
    script = (Path(__file__).parents[1] / "golden" / "index-v1.sql").read_text()
    file_place.root.mkdir()
    with closing(sqlite3.connect(file_place.root / "index.sqlite")) as old:
        old.executescript(script)
        for key, blob in old.execute("SELECT key, blob FROM entries").fetchall():
            publish(made, next(entry for entry in (plain, gone, salted, under) if entry.key == key))
            (file_place.root / "data" / key[:2]).mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file_place_2.file(key), file_place.root / "data" / key[:2] / blob)

    store = file_place.open()
    stats = store.stats()
    assert (stats.records, stats.entries, stats.evictions, stats.pinned_entries) == (3, 4, 1, 1)
    assert (stats.capacity_nbytes, stats.records_max) == (12345678, 77)
    assert usage(store, DEFAULT_TENANT) == (3, 1, 2) and usage(store, A) == (0, 0, 2)
    (found,) = store.get_records([plain.chunk_id])
    assert found is not None and (found.name, found.tags, found.pinned) == ("old", ("t", "u"), True)
    assert store.get_records([plain.chunk_id], [A]) == [None]
    assert seen(store, DEFAULT_TENANT, tag="u") == [(DEFAULT_TENANT, "old")]
    assert [info.key for info in store.list_entries([plain.chunk_id])] == [plain.key]
    assert [info.key for info in store.list_entries([plain.chunk_id], [A])] == [salted.key]
    assert all(loads(store, entry) for entry in (plain, gone, salted, under))
    assert store.miss_reason(child.key, child.chunk_id, MODEL, DEFAULT_TENANT) is MissReason.EVICTED
    assert len(store.ledger.claims.unfinished()) == 1 and store.ledger.upkeep.audit() == []
    with closing(sqlite3.connect(file_place.root / "index.sqlite")) as index, index:
        tables = [row[0] for row in index.execute("SELECT name FROM sqlite_master WHERE name LIKE 'old%'")]
        assert not tables
        index.execute("PRAGMA user_version = 9")
    with pytest.raises(StoreTooNew, match="version 9"):
        file_place.open()
