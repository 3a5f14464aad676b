"""A chunk store opened from the command line: where it is, which chunks are meant, and errors as commands report them.

Works on the store itself; no service has to run.
"""

from __future__ import annotations

import argparse
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from urllib.parse import unquote, urlsplit

from cairn.cli.arguments import UsageError
from cairn.client.errors import error_from_status
from chunk_store.errors import ClaimLost, StoreError, StoreFull, StoreTooNew, StoreUnavailable
from chunk_store.key import ChunkId, ModelIdentity
from chunk_store.local.database import remedy
from chunk_store.local.rebuild import INDEX, Renewed, renew_index
from chunk_store.open import open_store, shown_url
from chunk_store.password import password_from
from chunk_store.record import RecordQuery
from chunk_store.shared_store import SharedStore
from chunk_store.tools.selection import chunks_with_tag, each_record

_WHOLE_NAME = re.compile(r"[0-9a-f]{64}")
_NAME_PREFIX = re.compile(r"[0-9a-f]{6,63}")
_CODES: tuple[tuple[type[StoreError], str], ...] = (
    (StoreUnavailable, "UNAVAILABLE"),
    (StoreFull, "RESOURCE_EXHAUSTED"),
    (ClaimLost, "ABORTED"),
    (StoreTooNew, "FAILED_PRECONDITION"),
)


def add_store_flag(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--store",
        metavar="URL",
        default=store_from_environment(),
        help="file:///DIR, redis://..., rediss://... or mooncake://... (environment: CAIRN_STORE, and for its password "
        "CAIRN_STORE_PASSWORD or CAIRN_STORE_PASSWORD_FILE; default: the directory that `cairn up` uses)",
    )


def store_from_environment() -> str:
    """``CAIRN_STORE``, otherwise a directory below the user's cache."""
    cache = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return os.environ.get("CAIRN_STORE") or f"file://{cache}/cairn/store"


@contextmanager
def opened(url: str, *, create: bool = False) -> Iterator[SharedStore]:
    """The store at ``url``, closed at the end. A directory that holds none is refused unless ``create``.

    Raises ``UsageError`` for a URL that names no store, ``CairnError`` for what the store raises, then and later.
    """
    if not create:
        _check_directory(url)
    with _told(url), closing(open_store(url, password=password_from(os.environ))) as store:
        yield store


def with_sound_index(url: str) -> Renewed | None:
    """Puts an empty index where a directory's index is lost or damaged, before a repair; None where all is well.

    Raises as ``opened``.
    """
    directory = _directory(url)
    if directory is None or (not (directory / INDEX).exists() and not (directory / "data").exists()):
        return None
    with _told(url):
        return renew_index(directory)


@contextmanager
def _told(url: str) -> Iterator[None]:
    """A store's errors as commands report them."""
    try:
        yield
    except ValueError as error:
        raise UsageError(f"--store: {error}") from error
    except StoreError as error:
        code = next((code for kind, code in _CODES if isinstance(error, kind)), "DATA_LOSS")
        raise error_from_status(code, str(error), f"chunk store {shown_url(url)}") from error


def choose_chunks(store: SharedStore, words: Sequence[str], tags: Sequence[str]) -> list[ChunkId]:
    """Ids of the chunks that words (an id, the start of one, a name or ``:NAME``) and tags stand for, each once.

    Raises ``UsageError`` for a word that stands for more or less than one chunk and for a tag that no chunk bears.
    """
    chosen = [_chunk(store, word) for word in words]
    for tag in tags:
        if not tag:
            raise UsageError("--tag: must not be empty")
        tagged = chunks_with_tag(store, tag, None)
        if not tagged:
            raise UsageError(f"--tag: no chunk in the store bears {tag!r}; see: cairn chunks list")
        chosen += tagged
    return list(dict.fromkeys(chosen))


def choose_model(store: SharedStore, word: str) -> ModelIdentity:
    """The model with stored KV that an identity, or its first 6 digits or more, stands for. Raises ``UsageError``."""
    if _WHOLE_NAME.fullmatch(word) is None and _NAME_PREFIX.fullmatch(word) is None:
        raise UsageError(f"--model: {word!r} is not a model identity nor its first 6 digits; see: cairn store stats")
    found = {info.model for info in store.list_entries(tenants=None) if info.model.startswith(word)}
    if len(found) != 1:
        raise UsageError(f"--model: {word!r} stands for {len(found)} models with stored KV; see: cairn store stats")
    return found.pop()


def _chunk(store: SharedStore, word: str) -> ChunkId:
    named = word.startswith(":")
    name = word.removeprefix(":")
    if not name:
        raise UsageError("give a chunk's name, its id, or the first 6 digits of its id")
    if not named and _WHOLE_NAME.fullmatch(name):
        if store.get_records([ChunkId(name)], None)[0] is None:
            raise UsageError(f"no chunk {name} in the store (or it has expired); see: cairn chunks list")
        return ChunkId(name)
    found = {record.chunk_id for record in each_record(store, RecordQuery(name=name, tenants=None))}
    if not found and not named and _NAME_PREFIX.fullmatch(name):
        found = {
            record.chunk_id
            for record in each_record(store, RecordQuery(tenants=None))
            if record.chunk_id.startswith(name)
        }
    if len(found) != 1:
        raise UsageError(f"{word!r} stands for {len(found)} chunks; see: cairn chunks list")
    return found.pop()


def _check_directory(url: str) -> None:
    """A mistyped directory would otherwise become a new, empty store, and a lost index an empty one."""
    directory = _directory(url)
    if directory is None or (directory / INDEX).exists():
        return
    if (directory / "data").exists():
        raise UsageError(f"--store: {directory} has lost its index: {remedy(directory / INDEX)}")
    raise UsageError(f"--store: {directory} holds no chunk store; check --store and CAIRN_STORE")


def _directory(url: str) -> Path | None:
    """Where a ``file://`` store is; None for every other URL."""
    directory = Path(unquote(urlsplit(url).path)) if url.startswith("file:") else Path()
    return directory if directory.is_absolute() else None
