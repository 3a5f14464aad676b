"""One SQLite file for several processes: all or nothing, bounded waiting, and coming back."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import closing
from multiprocessing.queues import SimpleQueue
from multiprocessing.synchronize import Barrier
from pathlib import Path

import pytest

from chunk_store.errors import StoreTooNew, StoreUnavailable
from chunk_store.local.database import SIBLINGS, Database, Schema, check_version, remedy
from tests.chunk_store.processes import CONTEXT

ONE = Schema(1, "CREATE TABLE t (x)")
TWO = Schema(2, "CREATE TABLE t (x, y)", {1: "ALTER TABLE t ADD COLUMN y"})


@pytest.fixture
def database(tmp_path: Path) -> Iterator[Database]:
    opened = Database(tmp_path / "db", ONE, "NORMAL")
    yield opened
    opened.close()


def rows(database: Database) -> list[tuple[object, ...]]:
    with database.read() as connection:
        return connection.execute("SELECT * FROM t").fetchall()


def test_a_transaction_is_all_or_nothing(database: Database) -> None:
    with database.write() as connection:
        connection.execute("INSERT INTO t VALUES (1)")
    with pytest.raises(KeyError), database.write() as connection:
        connection.execute("INSERT INTO t VALUES (2)")
        raise KeyError
    assert rows(database) == [(1,)]


def test_who_waits_for_a_writer_waits_as_long_as_was_said(database: Database, tmp_path: Path) -> None:
    assert rows(database) == []
    with closing(sqlite3.connect(tmp_path / "db", isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        with pytest.raises(StoreUnavailable, match="locked"), database.write(0.01):
            pass
        assert rows(database) == [], "reading waits for nobody"
        other.execute("ROLLBACK")
    with database.write():
        pass


def test_files_that_vanish_or_are_replaced_are_noticed(database: Database, tmp_path: Path) -> None:
    with database.write() as connection:
        connection.execute("INSERT INTO t VALUES (1)")
    for suffix in SIBLINGS:
        Path(f"{tmp_path / 'db'}{suffix}").unlink(missing_ok=True)
    assert rows(database) == [], "a fresh one"


def test_an_older_file_is_brought_up_to_date_and_a_newer_one_refused(database: Database, tmp_path: Path) -> None:
    with database.write() as connection:
        connection.execute("INSERT INTO t VALUES (1)")
    database.close()
    with closing(Database(tmp_path / "db", TWO, "NORMAL")) as newer:
        assert rows(newer) == [(1, None)]
    with closing(Database(tmp_path / "db", ONE, "NORMAL")) as older, pytest.raises(StoreTooNew, match="version 2"):
        rows(older)
    with closing(sqlite3.connect(tmp_path / "db")) as connection:
        assert check_version(connection, 2, tmp_path / "db") == 2


def test_somebody_elses_database_is_left_alone(tmp_path: Path) -> None:
    with closing(sqlite3.connect(tmp_path / "db")) as connection:
        connection.execute("CREATE TABLE theirs (x)")
    with (
        closing(Database(tmp_path / "db", ONE, "NORMAL")) as ours,
        pytest.raises(StoreUnavailable, match="other tables"),
    ):
        rows(ours)


def test_a_damaged_file_names_the_command_that_mends_it(tmp_path: Path) -> None:
    (tmp_path / "db").write_bytes(b"no database at all" * 100)
    with closing(Database(tmp_path / "db", ONE, "NORMAL")) as broken:
        with pytest.raises(StoreUnavailable, match="is damaged") as caught:
            rows(broken)
        assert remedy(tmp_path / "db") in str(caught.value) and "verify --repair" in remedy(tmp_path / "db")


def test_a_closed_one_says_so(database: Database) -> None:
    database.close()
    with pytest.raises(StoreUnavailable, match="closed"):
        rows(database)


def open_at_once(path: Path, schema: Schema, begin: Barrier, reports: SimpleQueue[str]) -> None:
    begin.wait(60)
    try:
        with closing(Database(path, schema, "NORMAL")) as database:
            rows(database)
        reports.put("")
    except BaseException as error:
        reports.put(repr(error))


@pytest.mark.parametrize("older", [False, True], ids=["new", "of an older version"])
def test_processes_that_open_it_at_the_same_moment_all_find_it_made(tmp_path: Path, older: bool) -> None:
    """As two services do that are started together."""
    begin, reports = CONTEXT.Barrier(3), CONTEXT.SimpleQueue()
    for attempt in range(15):
        path = tmp_path / str(attempt) / "db"
        if older:
            with closing(Database(path, ONE, "NORMAL")) as database:
                rows(database)
        processes = [CONTEXT.Process(target=open_at_once, args=(path, TWO, begin, reports)) for _ in range(3)]
        for process in processes:
            process.start()
        assert [reports.get() for _ in processes] == ["", "", ""]
        for process in processes:
            process.join(60)
