"""One SQLite file that several processes share: transactions, waiting for each other, and coming back.

The file may vanish while it is open (somebody deletes the store): each transaction first compares the inode under
the path with the one that was opened, and starts over on a fresh file if they differ. A connection does not survive
``fork`` (SQLite's own locks do not); the child is told to open its own. This module knows no tables.
"""

from __future__ import annotations

import os
import random
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from chunk_store.store import StoreFull, StoreUnavailable

BUSY_WAIT_S = 20.0
PAUSE_S_MAX = 0.004


class Database:
    """A connection that reopens itself. One thread at a time; others wait."""

    def __init__(self, path: Path, schema: str, synchronous: str) -> None:
        self._path = path
        self._schema = schema
        self._synchronous = synchronous
        self._lock = threading.RLock()
        self._connection: sqlite3.Connection | None = None
        self._opened = (0, 0)  # device, inode
        self._process = os.getpid()
        self._closed = False

    @contextmanager
    def read(self) -> Iterator[sqlite3.Connection]:
        """A connection for single statements; each sees one consistent state. Raises ``StoreUnavailable``."""
        with self._lock, self._translated():
            yield self._ready()

    @contextmanager
    def write(self) -> Iterator[sqlite3.Connection]:
        """One write transaction: all of it or, after any exception, nothing.

        Raises ``StoreUnavailable``, and ``StoreFull`` when the disk is.
        """
        with self._lock, self._translated():
            connection = self._ready()
            _begin(connection)
            try:
                yield connection
                connection.execute("COMMIT")
            except BaseException:
                with suppress(sqlite3.Error):
                    connection.execute("ROLLBACK")
                raise

    def close(self) -> None:
        with self._lock:
            self._closed = True
            self._drop()

    def _ready(self) -> sqlite3.Connection:
        if self._closed:
            raise StoreUnavailable("the store was closed")
        if self._process != os.getpid():
            raise StoreUnavailable("the store was opened before fork(): open it in the child process")
        if self._connection is None or self._opened != self._identity():
            self._drop()
            self._connection = self._open()
        return self._connection

    def _identity(self) -> tuple[int, int]:
        try:
            found = os.stat(self._path)
        except OSError:
            return 0, 0
        return found.st_dev, found.st_ino

    def _open(self) -> sqlite3.Connection:
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise StoreUnavailable(f"cannot create {self._path.parent}: {error.strerror}") from error
        connection = sqlite3.connect(self._path, timeout=0.0, isolation_level=None, check_same_thread=False)
        try:
            _patiently(lambda: connection.execute("PRAGMA journal_mode=WAL"))
            connection.execute(f"PRAGMA synchronous={self._synchronous}")
            connection.execute("PRAGMA journal_size_limit=8388608")
            self._create(connection)
        except BaseException:
            connection.close()
            raise
        self._opened = self._identity()
        return connection

    def _create(self, connection: sqlite3.Connection) -> None:
        """Creates the tables unless they are there; ``user_version`` is set with them in one transaction."""
        if connection.execute("PRAGMA user_version").fetchone()[0]:
            return
        _begin(connection)
        try:
            if not connection.execute("PRAGMA user_version").fetchone()[0]:
                for statement in self._schema.split(";;"):
                    connection.execute(statement)
            connection.execute("COMMIT")
        except BaseException:
            with suppress(sqlite3.Error):
                connection.execute("ROLLBACK")
            raise

    def _drop(self) -> None:
        connection, self._connection = self._connection, None
        if connection is not None and self._process == os.getpid():
            with suppress(sqlite3.Error):
                connection.close()

    @contextmanager
    def _translated(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.DatabaseError as error:
            self._drop()
            text = str(error)
            if "is full" in text:
                raise StoreFull(f"{self._path}: the disk is full") from error
            if "malformed" in text or "not a database" in text:
                remedy = "stop the services, move index.sqlite away and run `cairn store verify --repair`"
                raise StoreUnavailable(f"{self._path} is damaged ({text}): {remedy}") from error
            raise StoreUnavailable(f"{self._path}: {text}") from error


def _begin(connection: sqlite3.Connection) -> None:
    _patiently(lambda: connection.execute("BEGIN IMMEDIATE"))


def _patiently(step: Callable[[], object]) -> None:
    """Runs ``step`` until no other process is in its way. SQLite's own waiting backs off to 100 ms; this does not."""
    deadline = time.monotonic() + BUSY_WAIT_S
    pause = 0.0002
    while True:
        try:
            step()
            return
        except sqlite3.OperationalError as error:
            busy = "locked" in str(error) or "busy" in str(error)
            if not busy or time.monotonic() > deadline:
                raise
        time.sleep(random.uniform(0.5, 1.0) * pause)
        pause = min(pause * 1.5, PAUSE_S_MAX)
