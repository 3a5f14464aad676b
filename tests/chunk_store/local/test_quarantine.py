"""Bad data that is kept for inspection: it counts, it makes room first, and it goes with age."""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest

from chunk_store.local.rebuild import renew_index
from chunk_store.shared_store import SharedStore
from chunk_store.tools.verify import repair, verify
from tests.chunk_store.contract import Damage, Sample, blank, loads, publish, sample, views_of
from tests.chunk_store.places import FilePlace

TOKENS = 200


def entry(number: int) -> Sample:
    return sample(number, tokens=TOKENS)


NBYTES = 4096 + entry(0).header.nbytes


def spoil(place: FilePlace, store: SharedStore, *numbers: int) -> None:
    """Stores entries and finds them bad."""
    for number in numbers:
        publish(store, entry(number))
        place.damage(entry(number).key, Damage.FLIPPED_DATA)
        assert not loads(store, entry(number))


def kept(place: FilePlace) -> int:
    folder = place.root / "quarantine"
    return len(list(folder.iterdir())) if folder.exists() else 0


def test_it_counts_toward_the_capacity(file_place: FilePlace) -> None:
    store = file_place.open()
    spoil(file_place, store, 1, 2)
    publish(store, entry(3))
    stats = store.stats()
    assert (stats.quarantine_entries, stats.quarantine_nbytes, stats.quarantined) == (2, 2 * NBYTES, 2)
    assert (stats.entries, stats.nbytes) == (1, 3 * NBYTES)
    assert verify(store).sound


def test_it_makes_room_before_good_entries_do(file_place: FilePlace) -> None:
    store = file_place.open(capacity_nbytes=4 * NBYTES)
    spoil(file_place, store, 1, 2)
    for number in (3, 4, 5, 6):
        publish(store, entry(number))
        assert store.stats().nbytes <= 4 * NBYTES
        assert sum(path.stat().st_size for path in file_place.root.rglob("*.????????????????")) <= 4 * NBYTES
    assert all(loads(store, entry(number)) for number in (3, 4, 5, 6)) and store.stats().evictions == 0
    assert store.stats().quarantine_entries == kept(file_place) == 0


def test_it_goes_with_age(file_place: FilePlace) -> None:
    store = file_place.open()
    spoil(file_place, store, 1, 2)
    store.sweep()
    assert kept(file_place) == 2, "a week by default"
    with closing(sqlite3.connect(file_place.root / "index.sqlite", isolation_level=None)) as index:
        index.execute("UPDATE quarantine SET since = since - 8 * 86400 WHERE blob LIKE ?", (f"{entry(1).key}%",))
    store.sweep()
    assert kept(file_place) == 1 and store.stats().quarantine_nbytes == NBYTES
    file_place.open(quarantine_s=0).sweep()
    assert kept(file_place) == 0
    assert (store.stats().quarantine_entries, store.stats().nbytes, store.stats().quarantined) == (0, 0, 2)


def test_what_an_older_or_lost_index_does_not_know_is_counted_too(file_place: FilePlace) -> None:
    store = file_place.open()
    spoil(file_place, store, 1, 2)
    store.close()
    (file_place.root / "index.sqlite").unlink()
    renew_index(file_place.root)
    again = file_place.open()
    assert repair(again).left == 0
    assert (again.stats().quarantine_entries, again.stats().nbytes) == (2, 2 * NBYTES)
    for path in (file_place.root / "quarantine").iterdir():
        path.unlink()
    again.sweep()
    assert (again.stats().quarantine_entries, again.stats().nbytes) == (0, 0)
    assert verify(again).sound


def unmovable(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(old: Path, new: Path) -> None:
        raise PermissionError(13, "no")

    monkeypatch.setattr(os, "replace", refuse)


@pytest.mark.parametrize("harm", [unmovable, lambda _: None])
def test_nothing_is_left_where_it_cannot_be_moved(
    file_place: FilePlace, monkeypatch: pytest.MonkeyPatch, harm: Callable[[pytest.MonkeyPatch], None]
) -> None:
    store = file_place.open()
    harm(monkeypatch)
    spoil(file_place, store, 1)
    monkeypatch.undo()
    assert store.load(entry(1).key, entry(1).header.token_ids, views_of(blank(entry(1)))) is not None
    repair(store)
    assert verify(store).sound
    assert dict(store.blobs.names()) == {}


def test_the_index_of_version_2_is_brought_up_to_date(file_place: FilePlace) -> None:
    """It had neither the table nor the column."""
    with closing(file_place.open()) as store:
        store.put_records([entry(1).record(name="kept", pinned=True)])
        publish(store, entry(1))
    with closing(sqlite3.connect(file_place.root / "index.sqlite", isolation_level=None)) as index:
        for statement in (
            "DROP INDEX records_transient",
            "ALTER TABLE records DROP COLUMN transient",
            "DROP TABLE quarantine",
            "DROP TRIGGER uses_out",
            "DROP TABLE uses",
            "DELETE FROM totals WHERE name = 'quarantine_nbytes'",
            "PRAGMA user_version = 2",
        ):
            index.execute(statement)
    again = file_place.open()
    (record,) = again.get_records([entry(1).chunk_id])
    assert record is not None and record.pinned and not record.transient
    assert loads(again, entry(1))
    spoil(file_place, again, 2)
    assert again.stats().quarantine_nbytes == NBYTES and verify(again).sound
