"""The embedded store proved by crashing it: kill -9, a full disk, a read-only directory, a deleted store."""

from __future__ import annotations

import os
import random
import shutil
import sqlite3
import subprocess
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any, cast

import pytest

from chunk_store.entry import MissReason
from chunk_store.errors import StoreError, StoreFull, StoreUnavailable
from chunk_store.local.blobs import Durability
from chunk_store.shared_store import SharedStore
from chunk_store.store import Busy, Stored
from chunk_store.tools.verify import repair, verify
from tests.chunk_store.contract import blank, loads, publish, sample, views_of
from tests.chunk_store.places import FilePlace
from tests.chunk_store.processes import child
from tests.chunk_store.workers import (
    CRASH_TOKENS,
    answer_until_killed,
    publish_once_each,
    publish_until_killed,
    read_until_killed,
)

KILLS = 200


def crash_sample(number: int):
    return sample(number, tokens=CRASH_TOKENS)


def check_sound(store: SharedStore) -> None:
    """Every entry loads and is right, nothing lies around that no entry owns, and the counts add up."""
    store.sweep()
    report = verify(store)
    assert report.sound, report.findings
    stored = {placed.blob: placed.stored_nbytes for placed in store.ledger.entries.placed()}
    assert dict(store.blobs.names()) == stored
    assert store.stats().nbytes == sum(stored.values())


def test_200_killed_writers(file_place: FilePlace) -> None:
    """What a writer reported as committed is there after its death; what it had not is not there at all."""
    store = file_place.open(capacity_nbytes=2**33)
    delays = random.Random(1)
    committed: set[int] = set()
    interrupted = 0
    for kill in range(KILLS):
        first = kill * 1000
        with child(publish_once_each, file_place.url(), first) as writer:
            if kill % 3:  # so that most have published something, however slow the machine is
                writer.wait_for_report()
            time.sleep(delays.uniform(0, 0.012))
            reported = [int(number) for number in writer.kill()]
        committed |= set(reported)
        interrupted += bool(store.ledger.claims.unfinished())
        assert all(loads(store, crash_sample(number)) for number in reported), "a committed entry was lost"
        following = crash_sample(first + len(reported) + 1)
        assert store.lookup([following.key]) == [None]
        if kill % 20 == 0:
            check_sound(store)
    assert interrupted > KILLS / 20, "too few writers died holding a claim for this to prove anything"
    assert len(committed) > KILLS / 2
    check_sound(store)
    assert store.stats().entries >= len(committed)
    assert store.stats().entries <= len(committed) + KILLS


def test_a_dead_writers_key_is_free_at_once(file_place: FilePlace) -> None:
    """No waiting for a TTL: a claim whose holder is known to be dead is taken over."""
    store = file_place.open()
    taken = 0
    for seed in range(30):
        with child(publish_until_killed, file_place.url(), seed, 1) as writer:
            time.sleep(0.002 * (seed % 5))
            writer.kill()
        entry = crash_sample(0)
        claimed = bool(store.ledger.claims.unfinished())
        outcome = store.begin(entry.key)
        assert not isinstance(outcome, Busy)
        if isinstance(outcome, Stored):
            store.delete_chunks([entry.chunk_id])
            continue
        taken += claimed
        with outcome:
            outcome.write(entry.header, entry.views)
            outcome.commit()
        assert loads(store, entry)
    assert taken > 0
    check_sound(store)


def test_writers_and_readers_killed_together(file_place: FilePlace) -> None:
    store = file_place.open(capacity_nbytes=20 * 360_000)
    keys = 60
    delays = random.Random(2)
    right = 0
    for round_number in range(6):
        with ExitStack() as stack:
            writers = [
                stack.enter_context(child(publish_until_killed, file_place.url(), 10 * round_number + seed, keys))
                for seed in range(3)
            ]
            readers = [
                stack.enter_context(child(read_until_killed, file_place.url(), 10 * round_number + seed, keys))
                for seed in range(3)
            ]
            time.sleep(delays.uniform(0.05, 0.2))
            for process in delays.sample([*writers, *readers], 6):
                reports = process.kill()
                assert b"wrong" not in reports
                right += reports.count(b"right")
        assert store.stats().nbytes <= store.stats().capacity_nbytes
    assert right > 20, "too few loads for this to prove anything"
    check_sound(store)


# -- the medium -----------------------------------------------------------------------------------------


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A tmpfs of 16 MiB."""
    mount = tmp_path / "disk"
    mount.mkdir()
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", str(mount)], capture_output=True, text=True, check=False
    )
    if done.returncode:
        pytest.skip(f"cannot mount a tmpfs here: {done.stderr.strip()}")
    yield mount
    subprocess.run(["umount", "-l", str(mount)], check=True)


def test_a_full_disk_evicts_or_says_so(small_disk: Path) -> None:
    """The capacity is larger than the disk: the store lives within what there is."""
    place = FilePlace(small_disk / "store")
    store = place.open(capacity_nbytes=2**30)
    entries = [crash_sample(number) for number in range(60)]
    for entry in entries:
        publish(store, entry)
        assert loads(store, entry)
    assert 10 <= store.stats().entries < 60
    assert store.stats().evictions > 0
    check_sound(store)
    with store.lease([info.key for info in store.list_entries()]):
        outcome = store.begin(crash_sample(99).key)
        assert not isinstance(outcome, Stored | Busy)
        with outcome, pytest.raises(StoreFull):
            outcome.write(crash_sample(99).header, crash_sample(99).views)
    check_sound(store)
    publish(store, crash_sample(99))
    assert loads(store, crash_sample(99))
    place.close()


def test_a_disk_that_others_fill_is_survived(small_disk: Path) -> None:
    place = FilePlace(small_disk / "store")
    store = place.open()
    publish(store, crash_sample(1))
    blocker = small_disk / "blocker"
    fd = os.open(blocker, os.O_CREAT | os.O_WRONLY)
    with pytest.raises(OSError, match="space"):
        while True:
            os.write(fd, b"x" * 4096)
    os.close(fd)
    assert loads(store, crash_sample(1)), "reading needs no space"
    with pytest.raises((StoreFull, StoreUnavailable)):
        for number in range(2, 1000):
            publish(store, sample(number))
    assert loads(store, crash_sample(1))
    blocker.unlink()
    publish(store, crash_sample(2))
    assert loads(store, crash_sample(2))
    check_sound(store)
    place.close()


def test_a_read_only_store_says_so_and_recovers(small_disk: Path) -> None:
    place = FilePlace(small_disk / "store")
    place.open().close()
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    with pytest.raises(StoreUnavailable, match="store"):
        place.open()
    with pytest.raises(StoreUnavailable, match="elsewhere"):
        FilePlace(small_disk / "elsewhere").open()
    subprocess.run(["mount", "-o", "remount,rw", str(small_disk)], check=True)
    store = place.open()
    publish(store, sample(1))
    assert loads(store, sample(1))
    place.close()


def test_a_store_deleted_under_a_running_process(file_place: FilePlace) -> None:
    """The process goes on by itself: misses first, then a new store in the same place, limits kept."""
    store = file_place.open(capacity_nbytes=12_345_678)
    entry = sample(1)
    store.put_records([entry.record()])
    publish(store, entry)
    lease = store.lease([entry.key])
    claim = store.begin(sample(2).key)
    assert not isinstance(claim, Stored | Busy)
    shutil.rmtree(file_place.root)
    assert store.load(entry.key, entry.header.token_ids, views_of(blank(entry))) is MissReason.NOT_STORED
    assert store.lookup([entry.key]) == [None]
    assert store.get_records([entry.chunk_id]) == [None]
    lease.renew()
    lease.release()
    with pytest.raises(StoreError):
        claim.write(sample(2).header, sample(2).views)
    claim.abort()
    publish(store, entry)
    assert loads(store, entry)
    assert loads(file_place.open(), entry)
    assert store.stats().capacity_nbytes == 12_345_678
    check_sound(store)


def test_only_the_data_deleted(file_place: FilePlace) -> None:
    store = file_place.open()
    publish(store, sample(1))
    shutil.rmtree(file_place.root / "data")
    assert not loads(store, sample(1))
    publish(store, sample(1))
    assert loads(store, sample(1))
    check_sound(store)


def test_only_the_index_deleted(file_place: FilePlace) -> None:
    """Data without an index is no entry until ``repair`` has looked at every byte of it."""
    store = file_place.open()
    for number in range(3):
        publish(store, sample(number))
    for path in file_place.root.glob("index.sqlite*"):
        path.unlink()
    assert not loads(store, sample(1))
    assert repair(store).adopted == 3
    assert all(loads(store, sample(number)) for number in range(3))
    check_sound(store)


def test_a_damaged_index_is_named_with_its_remedy(file_place: FilePlace) -> None:
    file_place.open().close()
    (file_place.root / "index.sqlite").write_bytes(b"this is not a database, it is a poem" * 100)
    with pytest.raises(StoreUnavailable, match="verify --repair"):
        file_place.open()


def test_services_recover_by_themselves_when_the_store_is_deleted(file_place: FilePlace) -> None:
    with child(answer_until_killed, file_place.url(), ready=False) as service:
        for _ in range(4):
            assert wait_for(service.reports, b"stored hit") or wait_for(service.reports, b"published hit")
            shutil.rmtree(file_place.root, ignore_errors=True)
            assert wait_for(service.reports, b"published hit"), "it publishes again after the deletion"


def wait_for(reports, wanted: bytes) -> bool:
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline and reports.poll(1):
        report = reports.recv_bytes()
        if report == wanted:
            return True
        assert b"TORN" not in report and b"BAD" not in report
    return False


def test_power_durability_syncs_what_it_commits(file_place: FilePlace, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[str] = []
    real = os.fsync

    def note(fd: int) -> None:
        synced.append(os.readlink(f"/proc/self/fd/{fd}"))
        real(fd)

    monkeypatch.setattr(os, "fsync", note)
    publish(file_place.open(), sample(1))
    assert synced == []
    publish(file_place.open(durability=Durability.POWER), sample(2))
    path = file_place.file(sample(2).key)
    assert synced == [str(path), str(path.parent)]


def test_a_store_opened_before_fork_is_refused_in_the_child(file_place: FilePlace) -> None:
    store = file_place.open()
    pid = os.fork()
    if pid == 0:
        try:
            store.lookup([sample(1).key])
        except StoreUnavailable as error:
            os._exit(7 if "fork" in str(error) else 8)
        finally:
            os._exit(9)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 7
    publish(store, sample(1))
    assert loads(store, sample(1))


def test_who_reads_first_does_not_wait_for_who_waits_to_write(file_place: FilePlace) -> None:
    publish(file_place.open(), sample(1))
    store = file_place.open()
    with closing(sqlite3.connect(file_place.root / "index.sqlite", isolation_level=None)) as blocker:
        blocker.execute("BEGIN IMMEDIATE")
        with ThreadPoolExecutor(1) as threads:
            waiting = threads.submit(store.begin, sample(2).key)
            while cast(Any, store.ledger.claims)._index._database._writer.connection is None:
                time.sleep(0.001)
            assert store.lookup([sample(1).key])[0] is not None
            assert not waiting.done()
            blocker.execute("ROLLBACK")
            claim = waiting.result(timeout=30)
    assert claim is not None
    cast(Any, claim).abort()


def test_writers_wait_for_each_other_but_not_for_ever(file_place: FilePlace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("chunk_store.local.database.BUSY_WAIT_S", 0.2)
    store = file_place.open()
    publish(store, sample(1))
    blocker = sqlite3.connect(file_place.root / "index.sqlite", isolation_level=None)
    blocker.execute("BEGIN IMMEDIATE")
    with pytest.raises(StoreUnavailable, match="locked"):
        store.begin(sample(2).key)
    assert loads(store, sample(1)), "readers do not wait for writers"
    blocker.execute("ROLLBACK")
    blocker.close()
    publish(store, sample(2))
