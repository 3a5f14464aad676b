"""One SQLite file that several processes share: transactions, waiting for each other, and coming back.

The files may vanish while they are open (somebody deletes the store): each transaction first compares the inodes under
the paths with those that were opened, and starts over on fresh files if they differ. A connection does not survive
``fork`` (SQLite's own locks do not); the child is told to open its own. An index of an older version is brought up to
date when it is opened, a newer one is refused. This module knows no tables.
"""

from __future__ import annotations

import os
import random
import shlex
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import quote

from chunk_store.errors import StoreFull, StoreTooNew, StoreUnavailable
from chunk_store.local.private_files import close_to_others, create_file, make_directory

BUSY_WAIT_S = 20.0
PAUSE_S_MAX = 0.004
SIBLINGS = ("", "-wal", "-shm")  # the files of one database, behind its name
_DAMAGED = ("malformed", "is not a database", "no such table", "no such column", "decode", "file format")


@dataclass(frozen=True)
class Schema:
    """How to make the tables of ``version``, and how to come to it from each older version."""

    version: int
    create: str
    migrations: Mapping[int, str] = field(default_factory=dict)


class _Handle:
    """One connection, used by one thread at a time, and which files it was opened on (device and inode)."""

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.connection: sqlite3.Connection | None = None
        self.opened: tuple[tuple[int, int], ...] = ()

    def drop(self) -> None:
        connection, self.connection = self.connection, None
        if connection is not None:
            with suppress(sqlite3.Error):
                connection.close()


class Database:
    """Two connections that reopen themselves: who reads waits for no writer, nor for who waits to write."""

    def __init__(self, path: Path, schema: Schema, synchronous: str) -> None:
        self._path = path
        self._schema = schema
        self._synchronous = synchronous
        self._files = [f"{path}{suffix}" for suffix in SIBLINGS]
        self._writer, self._reader = _Handle(), _Handle()
        self._suspect = False  # a connection met an error: within a process they share what may be wrong
        self._process = os.getpid()
        self._closed = False

    @contextmanager
    def read(self) -> Iterator[sqlite3.Connection]:
        """A connection for single statements; each sees one consistent state. Raises ``StoreUnavailable``."""
        with self._use(self._reader, time.monotonic() + BUSY_WAIT_S) as connection:
            yield connection

    @contextmanager
    def write(self, wait_s: float | None = None) -> Iterator[sqlite3.Connection]:
        """One write transaction: all of it or, after any exception, nothing.

        Waits at most ``wait_s`` seconds (``BUSY_WAIT_S``) for other threads and processes that write. Raises
        ``StoreUnavailable``, and ``StoreFull`` when the disk is.
        """
        deadline = time.monotonic() + (BUSY_WAIT_S if wait_s is None else wait_s)
        with self._use(self._writer, deadline) as connection:
            _begin(connection, deadline)
            try:
                yield connection
                connection.execute("COMMIT")
            except BaseException:
                with suppress(sqlite3.Error):
                    connection.execute("ROLLBACK")
                raise

    def close(self) -> None:
        self._closed = True
        with self._locked(time.monotonic() + BUSY_WAIT_S, self._writer, self._reader):
            self._drop_all()

    @contextmanager
    def _use(self, handle: _Handle, deadline: float) -> Iterator[sqlite3.Connection]:
        with self._translated():
            while True:
                with self._locked(deadline, handle):
                    if not self._is_stale(handle):
                        if handle.connection is None:  # no other lock: who waits to write keeps nobody from reading
                            handle.connection = self._open()
                            handle.opened = self._identity()
                        yield handle.connection
                        return
                with self._locked(deadline, self._writer, self._reader):
                    if self._is_stale(handle):
                        self._drop_all()  # both: as long as one is open, another would share its log
                        self._suspect = False

    @contextmanager
    def _locked(self, deadline: float, *handles: _Handle) -> Iterator[None]:
        held: list[_Handle] = []
        try:
            for handle in handles:
                if not handle.lock.acquire(timeout=max(0.0, deadline - time.monotonic())):
                    raise StoreUnavailable(f"{self._path}: locked by another writer")
                held.append(handle)
            yield
        finally:
            for handle in held:
                handle.lock.release()

    def _is_stale(self, handle: _Handle) -> bool:
        if self._closed:
            raise StoreUnavailable("the store was closed")
        if self._process != os.getpid():
            raise StoreUnavailable("the store was opened before fork()", "open it in the child process")
        opened = [other.opened for other in (handle, self._writer, self._reader) if other.connection is not None]
        return self._suspect or (bool(opened) and opened[0] != self._identity())

    def _drop_all(self) -> None:
        if self._process == os.getpid():
            self._writer.drop()
            self._reader.drop()

    def _identity(self) -> tuple[tuple[int, int], ...]:
        """Of all three files: whoever goes on with a log that others do not see would spoil the database."""
        return tuple(map(_inode, self._files))

    def _open(self) -> sqlite3.Connection:
        try:
            make_directory(self._path.parent)
        except OSError as error:
            raise StoreUnavailable(f"cannot create {self._path.parent}: {error.strerror}") from error
        with suppress(OSError):  # SQLite says it better; an existing one is not opened: closing it would end its locks
            os.close(create_file(self._path, os.O_RDWR | os.O_EXCL))
        for suffix in SIBLINGS:  # SQLite gives new ones the mode of the first
            close_to_others(Path(f"{self._path}{suffix}"))
        connection = sqlite3.connect(self._path, timeout=0.0, isolation_level=None, check_same_thread=False)
        try:
            _patiently(lambda: connection.execute("PRAGMA journal_mode=WAL"), time.monotonic() + BUSY_WAIT_S)
            connection.execute(f"PRAGMA synchronous={self._synchronous}")
            connection.execute("PRAGMA journal_size_limit=8388608")
            # Even reading may find it locked while another process makes, or was the last to close, its log.
            _patiently(lambda: self._prepare(connection), time.monotonic() + BUSY_WAIT_S)
        except BaseException:
            connection.close()
            raise
        return connection

    def _prepare(self, connection: sqlite3.Connection) -> None:
        """Creates the tables or brings them up to date, in one transaction with ``user_version``."""
        if check_version(connection, self._schema.version, self._path) == self._schema.version:
            return
        _begin(connection, time.monotonic() + BUSY_WAIT_S)
        try:
            found = check_version(connection, self._schema.version, self._path)
            if found < self._schema.version:  # another process may have done it meanwhile
                self._bring_up_to_date(connection, found)
            connection.execute("COMMIT")
        except BaseException:
            with suppress(sqlite3.Error):
                connection.execute("ROLLBACK")
            raise

    def _bring_up_to_date(self, connection: sqlite3.Connection, found: int) -> None:
        if not found and connection.execute("SELECT COUNT(*) FROM sqlite_master").fetchone()[0]:
            raise sqlite3.DatabaseError("file is not a database of this store: it has other tables")
        script = self._schema.migrations[found] if found else self._schema.create
        for statement in script.split(";;"):
            connection.execute(statement)
        connection.execute(f"PRAGMA user_version = {self._schema.version}")

    @contextmanager
    def _translated(self) -> Iterator[None]:
        try:
            yield
        except (sqlite3.DatabaseError, UnicodeDecodeError) as error:
            text = str(error)
            self._suspect = self._suspect or not _is_busy(error)
            if "is full" in text:
                raise StoreFull(f"{self._path}: the disk is full", "free space on it") from error
            if any(words in text for words in _DAMAGED):
                raise StoreUnavailable(f"{self._path} is damaged ({text})", remedy(self._path)) from error
            raise StoreUnavailable(f"{self._path}: {text}") from error


def _inode(path: str) -> tuple[int, int]:
    try:
        found = os.stat(path)
    except OSError:
        return 0, 0
    return found.st_dev, found.st_ino


def check_version(connection: sqlite3.Connection, newest: int, path: Path) -> int:
    """The version of the tables, 0 without any. Raises ``StoreTooNew``."""
    found = int(connection.execute("PRAGMA user_version").fetchone()[0])
    if found > newest:
        raise StoreTooNew(
            f"{path} has version {found}, written by newer software; this software reads up to version {newest}",
            "use the newer one, or another directory",
        )
    return found


def remedy(path: Path) -> str:
    """What to do about an index that is damaged or lost."""
    return (
        "stop the services and run `cairn store verify --repair --store "
        f"{shlex.quote(f'file://{quote(str(path.parent))}')}`: it sets {path.name}, {path.name}-wal and "
        f"{path.name}-shm aside and builds a new index from the data"
    )


def _begin(connection: sqlite3.Connection, deadline: float) -> None:
    _patiently(lambda: connection.execute("BEGIN IMMEDIATE"), deadline)


def _is_busy(error: Exception) -> bool:
    """Whether another connection was in the way, and nothing else is wrong."""
    return isinstance(error, sqlite3.OperationalError) and ("locked" in str(error) or "busy" in str(error))


def _patiently(step: Callable[[], object], deadline: float) -> None:
    """Runs ``step`` until no other process is in its way. SQLite's own waiting backs off to 100 ms; this does not."""
    pause = 0.0002
    while True:
        try:
            step()
            return
        except sqlite3.OperationalError as error:
            if not _is_busy(error) or time.monotonic() > deadline:
                raise
        time.sleep(random.uniform(0.5, 1.0) * pause)
        pause = min(pause * 1.5, PAUSE_S_MAX)
