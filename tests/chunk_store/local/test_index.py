"""Marks of use are gathered, written with the next change, and never wait for anybody."""

from __future__ import annotations

import sqlite3
import time
from contextlib import closing
from pathlib import Path

import pytest

from chunk_store.local.index import INDEX, Index
from tests.chunk_store.contract import sample


def used(index: Index) -> float:
    with index.read() as connection:
        return float(connection.execute("SELECT last_used_at FROM entries").fetchone()[0])


@pytest.fixture
def filled(index: Index) -> Index:
    with index.write() as connection:
        connection.execute("INSERT INTO entries VALUES (?, 'b', 'c', 'm', '', 1, 1, 1, 1, 1, 0)", (sample(1).key,))
    return index


def test_a_mark_is_written_with_the_next_change_and_never_goes_back(filled: Index) -> None:
    filled.mark_used(sample(1).key, 50.0)
    assert used(filled) == 1.0
    with filled.write():
        pass
    assert used(filled) == 50.0
    filled.mark_used(sample(1).key, 40.0)
    filled.flush()
    assert used(filled) == 50.0


def test_a_mark_that_waited_long_is_written_by_the_next(filled: Index) -> None:
    filled.mark_used(sample(1).key, 50.0)
    filled.mark_used(sample(1).key, 50.5)
    assert used(filled) == 1.0
    filled.mark_used(sample(1).key, 51.5)
    assert used(filled) == 51.5


def test_who_writes_keeps_no_reader_from_marking(filled: Index, tmp_path: Path) -> None:
    with closing(sqlite3.connect(tmp_path / INDEX, isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        began = time.monotonic()
        filled.mark_used(sample(1).key, 50.0)
        filled.flush()
        assert time.monotonic() - began < 15.0, "it does not wait as long as a writer would"
        assert used(filled) == 1.0
