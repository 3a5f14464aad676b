"""A directory whose index is lost, damaged or newer: what is said, what is rebuilt, what is never touched."""

from __future__ import annotations

import random
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import pytest

from chunk_store.errors import StoreTooNew, StoreUnavailable
from chunk_store.format.versions import INDEX_VERSION
from chunk_store.local.rebuild import index_damage, renew_index
from chunk_store.shared_store import SharedStore
from chunk_store.tools.verify import repair, verify
from tests.chunk_store.contract import Sample, loads, publish, sample
from tests.chunk_store.places import FilePlace
from tests.chunk_store.processes import child
from tests.chunk_store.workers import answer_until_killed

PARENT = sample(90)
ENTRIES = [sample(number, context=[PARENT.key] if number % 2 else []) for number in range(8)] + [PARENT]


@pytest.fixture
def filled(file_place: FilePlace) -> FilePlace:
    """A store at rest with nine entries, some under the context of another, and their records."""
    with closing(file_place.open()) as store:
        for entry in [PARENT, *ENTRIES[:-1]]:
            store.put_records([entry.record(name=f"n-{entry.key[:6]}", tags=("t",))])
            publish(store, entry)
    return file_place


def rebuilt(place: FilePlace) -> SharedStore:
    renewed = renew_index(place.root)
    store = place.open()
    report = repair(store)
    assert (renewed is not None) == (report.adopted == len(ENTRIES)), (renewed, report)
    assert report.left == report.removed == 0
    return store


def garbage(path: Path) -> None:
    path.write_bytes(random.Random(1).randbytes(path.stat().st_size))


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 3])


def without_a_table(path: Path) -> None:
    with closing(sqlite3.connect(path, isolation_level=None)) as connection:
        connection.execute("DROP TABLE needs")


def another_database(path: Path) -> None:
    path.unlink()
    with closing(sqlite3.connect(path, isolation_level=None)) as connection:
        connection.execute("CREATE TABLE songs (name TEXT)")


def no_page_in_the_middle(path: Path) -> None:
    raw = bytearray(path.read_bytes())
    raw[4096 : len(raw) // 2] = bytes(len(raw) // 2 - 4096)
    path.write_bytes(raw)


def a_directory(path: Path) -> None:
    path.unlink()
    path.mkdir()


HARMS = [Path.unlink, garbage, cut, without_a_table, another_database, no_page_in_the_middle, a_directory]


@pytest.mark.parametrize("harm", [*HARMS, lambda path: path.write_bytes(b"")])
def test_a_lost_index_is_rebuilt_from_the_data(filled: FilePlace, harm: Callable[[Path], None]) -> None:
    """Every entry is there again, its place in the order of contexts too; the old index is kept beside the new one."""
    index = filled.root / "index.sqlite"
    harm(index)
    there = index.exists()
    assert index_damage(filled.root)
    store = rebuilt(filled)
    assert all(loads(store, entry) for entry in ENTRIES)
    assert verify(store).sound
    assert len(list(filled.root.glob("index.sqlite.damaged-*"))) == there
    assert store.stats().records == 0, "content is registered again"
    parent = store.ledger.entries.locate(PARENT.key)
    assert parent is not None
    store.put_records([entry.record() for entry in ENTRIES])
    assert store.delete_chunks([PARENT.chunk_id]).entries == 1
    assert renew_index(filled.root) is None, "a sound index stays"


@pytest.mark.parametrize("lost", [("-wal",), ("-shm",), ("-wal", "-shm"), ("", "-wal", "-shm")])
@pytest.mark.parametrize("how", [Path.unlink, garbage, lambda path: path.write_bytes(b"")])
def test_a_lost_log_or_shared_memory(
    file_place: FilePlace, tmp_path: Path, lost: tuple[str, ...], how: Callable[[Path], None]
) -> None:
    """After a crash the newest rows are in the log alone; without it the data says what was there."""
    store = file_place.open()
    for entry in [PARENT, *ENTRIES[:-1]]:
        publish(store, entry)
    crashed = FilePlace(tmp_path / "crashed")
    for path in file_place.root.rglob("*"):
        if path.is_file():
            copy = crashed.root / path.relative_to(file_place.root)
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.write_bytes(path.read_bytes())
    for suffix in lost:
        how(crashed.root / f"index.sqlite{suffix}")
    again = rebuilt(crashed)
    assert all(loads(again, entry) for entry in ENTRIES) and verify(again).sound
    crashed.close()


def test_the_capacity_is_never_less_than_the_data(filled: FilePlace, monkeypatch: pytest.MonkeyPatch) -> None:
    """The old index knew the capacity; a default smaller than the data would evict it at once."""
    monkeypatch.setattr("chunk_store.local.rebuild.CAPACITY_NBYTES_DEFAULT", 5000)
    (filled.root / "index.sqlite").unlink()
    store = rebuilt(filled)
    assert store.stats().entries == len(ENTRIES)
    assert store.stats().capacity_nbytes == store.stats().nbytes


@pytest.mark.parametrize("harm", [garbage, without_a_table, another_database])
def test_the_error_names_all_three_files_and_the_command(filled: FilePlace, harm: Callable[[Path], None]) -> None:
    harm(filled.root / "index.sqlite")
    with pytest.raises(StoreUnavailable) as caught:
        publish(filled.open(), sample(99))
        filled.open().list_entries()
        filled.open().sweep()
    said = str(caught.value)
    assert f"cairn store verify --repair --store file://{filled.root}" in said
    assert "index.sqlite-wal" in said and "index.sqlite-shm" in said


def test_an_index_of_newer_software_is_refused_and_left_alone(filled: FilePlace) -> None:
    index = filled.root / "index.sqlite"
    with closing(sqlite3.connect(index, isolation_level=None)) as connection:
        connection.execute(f"PRAGMA user_version = {INDEX_VERSION + 1}")
    before = index.read_bytes()
    with pytest.raises(StoreTooNew, match=f"version {INDEX_VERSION + 1}.* up to version {INDEX_VERSION}"):
        filled.open()
    with pytest.raises(StoreTooNew):
        renew_index(filled.root)
    assert index.read_bytes() == before
    assert not list(filled.root.glob("index.sqlite.*"))


def test_an_index_that_somebody_has_open_stays(filled: FilePlace) -> None:
    """Without its log the index looks lost; while its holder runs it is not."""
    with child(answer_until_killed, filled.url(), ready=False) as service:
        assert service.reports.poll(20)
        without_a_table(filled.root / "index.sqlite")
        with pytest.raises(StoreUnavailable, match="open in another process; stop the services"):
            renew_index(filled.root)
        service.kill()
    store = rebuilt_with_what_the_service_stored(filled)
    assert all(loads(store, entry) for entry in ENTRIES)


def rebuilt_with_what_the_service_stored(place: FilePlace) -> SharedStore:
    assert renew_index(place.root) is not None
    store = place.open()
    assert repair(store).adopted >= len(ENTRIES)
    return store


@pytest.fixture
def two(file_place: FilePlace) -> Iterator[tuple[SharedStore, SharedStore]]:
    yield file_place.open(), file_place.open()


@pytest.mark.parametrize("suffix", ["-wal", "-shm"])
def test_a_log_deleted_under_running_processes(
    file_place: FilePlace, two: tuple[SharedStore, SharedStore], suffix: str
) -> None:
    """A call or two may fail; then all write where the others read, and a repair brings back what was lost."""
    entries: list[Sample] = [sample(number) for number in range(6)]
    publish(two[0], entries[0])
    (file_place.root / f"index.sqlite{suffix}").unlink()
    failed = 0
    for number, entry in enumerate(entries[1:]):
        for attempt in range(3):
            try:
                publish(two[(number + attempt) % 2], entry)
                break
            except StoreUnavailable:
                failed += 1
    assert failed <= 3
    assert repair(two[1]).left == 0
    assert all(loads(store, entry) for store in two for entry in entries)
    assert verify(two[0]).sound
