"""A directory whose index is lost or damaged gets a new one: the old index is set aside, the data is read again.

Every entry says in its header which key, tokens, context and model it has, so ``verify.repair`` can adopt it into an
empty index. Names, tags, pins, TTLs and the token ids behind a chunk id are in the index alone: they are lost with it.

Safe beside running services: an index that another process has open is not touched, and services find the new index
under the old name and go on with it. Not for a process that has the store open itself: closing a file ends the locks
that the process has on it.
"""

from __future__ import annotations

import fcntl
import os
import sqlite3
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path

from chunk_store.errors import StoreUnavailable
from chunk_store.format.versions import INDEX_VERSION
from chunk_store.limits import CAPACITY_NBYTES_DEFAULT, StoreLimits
from chunk_store.local.blobs import Durability, FileBlobs
from chunk_store.local.database import SIBLINGS, check_version
from chunk_store.local.index import INDEX
from chunk_store.local.ledger import local_ledger
from chunk_store.local.schema import SCHEMA

_SHARED_LOCK = (0x40000002, 510)  # where SQLite keeps the lock that every open connection holds: start, length
WAL = 2  # SQLite's newest file format, bytes 18 and 19
_NOT_NOW = ("locked", "busy", "unable to open", "disk I/O", "is full", "permission")


@dataclass(frozen=True)
class Renewed:
    """Why there is a new, empty index, where the old one went, and the capacity that the new one has."""

    reason: str
    aside: tuple[Path, ...]
    capacity_nbytes: int


def renew_index(root: Path) -> Renewed | None:
    """Puts an empty index where the old one is lost or damaged, for ``repair`` to fill; None where it is sound.

    The store's capacity was in the old index: the new one takes the default, or as much as the data has if that is
    more, so that nothing is evicted. Raises ``StoreTooNew``, ``StoreUnavailable``.
    """
    reason = index_damage(root)
    if not reason:
        return None
    aside = set_index_aside(root)
    with closing(FileBlobs(root, Durability.PROCESS)) as blobs:
        capacity_nbytes = max(CAPACITY_NBYTES_DEFAULT, sum(nbytes for _, nbytes in blobs.names()))
    local_ledger(root / INDEX, StoreLimits(capacity_nbytes)).close()
    return Renewed(reason, tuple(aside), capacity_nbytes)


def index_damage(root: Path) -> str:
    """Why the index of ``root`` cannot be used; "" when it can. Changes nothing.

    Raises ``StoreTooNew``, ``StoreUnavailable`` when it cannot be read now.
    """
    path = root / INDEX
    if not path.exists():
        return "there is none" if (root / "data").exists() else ""
    if not path.is_file():
        return "it is not a file"
    with open(path, "rb") as file:
        if max(file.read(20)[18:], default=0) > WAL:
            return "its file format is unknown"  # SQLite would only read it
    try:
        with closing(sqlite3.connect(path, timeout=10.0, isolation_level=None)) as connection:
            return _inner_damage(connection, path)
    except (sqlite3.DatabaseError, UnicodeDecodeError) as error:
        if any(words in str(error) for words in _NOT_NOW):
            raise StoreUnavailable(f"{path}: {error}") from error
        return str(error)


def _inner_damage(connection: sqlite3.Connection, path: Path) -> str:
    found = check_version(connection, INDEX_VERSION, path)
    names = _names(connection)
    if not found and not names:
        return "it is empty"
    missing = _wanted_names() - names if found in (0, INDEX_VERSION) else set()
    if missing:
        return f"it has no {', '.join(sorted(missing))}"
    problems = [str(row[0]) for row in connection.execute("PRAGMA integrity_check(3)") if row[0] != "ok"]
    for table in ("entries", "records", "settings", "totals"):
        for _ in connection.execute(f"SELECT * FROM {table}"):
            pass  # a text that does not decode raises
    return "; ".join(problems)


def set_index_aside(root: Path) -> list[Path]:
    """Renames what there is of the index, and returns the new names. Does not look whether it is damaged.

    Raises ``StoreUnavailable`` when another process has the index open, or the directory cannot be written.
    """
    path = root / INDEX
    stamp = time.strftime("%Y%m%dT%H%M%S", time.gmtime())
    moved = []
    with _alone(path):
        for suffix in reversed(SIBLINGS):
            old = Path(f"{path}{suffix}")
            new = root / f"{INDEX}.damaged-{stamp}{suffix}"
            try:
                old.rename(new)
            except FileNotFoundError:
                continue
            except OSError as error:
                raise StoreUnavailable(f"cannot rename {old}: {error.strerror}") from error
            moved.append(new)
    return moved


@contextmanager
def _alone(path: Path) -> Iterator[None]:
    """Keeps other processes out of the index. Raises ``StoreUnavailable`` when one is in it."""
    try:
        fd = os.open(path, os.O_RDWR)
    except OSError:  # nothing there, or a directory: nobody can have it open as an index
        yield
        return
    try:
        start, length = _SHARED_LOCK
        fcntl.lockf(fd, fcntl.LOCK_EX | fcntl.LOCK_NB, length, start)
        yield
    except BlockingIOError as error:
        raise StoreUnavailable(f"{path} is open in another process", "stop the services, then try again") from error
    finally:
        os.close(fd)


def _names(connection: sqlite3.Connection) -> set[str]:
    return {str(row[0]) for row in connection.execute("SELECT name FROM sqlite_master WHERE name NOT LIKE 'sqlite_%'")}


def _wanted_names() -> set[str]:
    with closing(sqlite3.connect(":memory:", isolation_level=None)) as connection:
        for statement in SCHEMA.split(";;"):
            connection.execute(statement)
        return _names(connection)
