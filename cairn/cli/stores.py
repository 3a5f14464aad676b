"""A chunk store opened from the command line: where it is, which chunks are meant, and errors as commands report them.

Works on the store itself; no service has to run.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import TypeVar
from urllib.parse import unquote, urlsplit

from cairn.cli.arguments import UsageError, shown
from cairn.cli.selection import SEE_CHUNKS, choose_ids, is_id, may_be_id, only
from cairn.client.errors import error_from_status
from cairn.local.services import default_store
from chunk_store.errors import ClaimLost, StoreError, StoreFull, StoreTooNew, StoreUnavailable
from chunk_store.key import ChunkId, ModelIdentity
from chunk_store.local.database import remedy
from chunk_store.local.index import INDEX
from chunk_store.local.rebuild import Renewed, renew_index
from chunk_store.open import open_store, shown_url
from chunk_store.record import RecordQuery
from chunk_store.shared_store import SharedStore
from chunk_store.tools.selection import each_record
from serving.process.options import StoreOptions
from serving.process.sources import SettingError, Sources, resolve

Place = TypeVar("Place", bound=StoreOptions)
SEE_STATS = "see: cairn store stats"
_CODES: tuple[tuple[type[StoreError], str], ...] = (
    (StoreUnavailable, "UNAVAILABLE"),
    (StoreFull, "RESOURCE_EXHAUSTED"),
    (ClaimLost, "ABORTED"),
    (StoreTooNew, "FAILED_PRECONDITION"),
)


def options_from(options: type[Place], args: argparse.Namespace) -> Place:
    """The settings that flags, environment and file give to a command. Raises ``UsageError``."""
    try:
        found = resolve(options, "", Sources.read(vars(args)), defaults={"store": default_store()})
        found.check_files()
    except SettingError as error:
        raise UsageError(str(error)) from error
    return found.options


def add_chunk_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("chunk", nargs="*", metavar="CHUNK")
    parser.add_argument(
        "--tag", action="append", default=[], metavar="TAG", help="chunks that bear it; may be repeated"
    )


@contextmanager
def opened(options: StoreOptions, *, create: bool = False) -> Iterator[SharedStore]:
    """The store, closed at the end. A directory that holds none is refused unless ``create``.

    Raises ``UsageError`` for a URL that names no store, ``CairnError`` for what the store raises, then and later.
    """
    if not create:
        _check_directory(options.store)
    with _told(options.store), closing(open_store(options.store, password=options.password())) as store:
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
    """Ids of the chunks that words and tags stand for. Raises ``UsageError`` as ``choose_ids``, and for unknown ids."""

    def ids(*, name: str = "", tag: str = "") -> Iterator[str]:
        return (record.chunk_id for record in each_record(store, RecordQuery(name=name, tag=tag, tenants=None)))

    whole = [ChunkId(word.lower()) for word in words if is_id(word)]
    for chunk_id, record in zip(whole, store.get_records(whole, None), strict=True):
        if record is None:
            raise UsageError(f"no chunk {chunk_id} in the store (or it has expired); {SEE_CHUNKS}")
    return [ChunkId(chunk_id) for chunk_id in choose_ids(words, tags, ids)]


def choose_model(store: SharedStore, word: str) -> ModelIdentity:
    """The model with stored KV that an identity, or its first 6 digits or more, stands for. Raises ``UsageError``."""
    if not may_be_id(word):
        raise UsageError(f"--model: {shown(word)} is not a model identity nor its first 6 digits; {SEE_STATS}")
    found = {info.model for info in store.list_entries(tenants=None) if info.model.startswith(word.lower())}
    return ModelIdentity(only(word, found, "models with stored KV", SEE_STATS))


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
