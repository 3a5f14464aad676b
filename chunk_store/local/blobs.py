"""Blobs as plain files in a directory: written with ``pwritev``, read with ``preadv`` into the caller's memory.

    DIR/data/ab/abcd....nonce     one file per blob; the header goes in last, so a cut file has no magic
    DIR/quarantine/               the latest bad blobs, kept for inspection, as the ledger says

All of it is readable by its owner alone (``private_files.py``).

This module knows nothing of claims, leases or capacity.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from enum import StrEnum
from pathlib import Path

from chunk_store.blobs import Expected, Quarantined
from chunk_store.entry import EntryHeader
from chunk_store.errors import BlobMissing, BlobUnreadable, NoSpace, StoreUnavailable
from chunk_store.format.header import (
    BLOCK_NBYTES,
    Frame,
    encode_header,
    header_nbytes,
    split_blocks,
)
from chunk_store.landing import Landing
from chunk_store.local.entry_file import (
    BatchHashing,
    SharedPieces,
    batches_of,
    check_headroom,
    pieces_of,
    read_data,
    read_frame,
    sync_directory,
    write_all,
)
from chunk_store.local.private_files import close_to_others, create_file, make_directory

SHARE_NBYTES_MIN = 4 * 2**20  # for less a second thread costs more than it saves, most of all where all are busy
READERS_MAX = 16
# Processors that one read is shared out over. With four loads beside each other 16 processors then have some left for
# copies to a device: 145 ms for 4.8 GB, 167 with four (bench.gpu_loads on an H200).
SHARES_MAX = 3


class Durability(StrEnum):
    """What a committed entry survives.

    PROCESS: the death of any process at any point (``kill -9``); after a power cut the latest entries may be
    missing or cut, which their checksums turn into misses. POWER: a power cut too, at the price of an fsync of
    file and directory for each entry and each change of metadata.
    """

    PROCESS = "process"
    POWER = "power"


class FileBlobs:
    """The ``Blobs`` of one directory."""

    kind = "file"

    def __init__(self, root: Path, durability: Durability) -> None:
        self._data = root / "data"
        self._quarantine = root / "quarantine"
        self._durability = durability
        for folder in (self._data, self._quarantine):
            close_to_others(folder)
        self._helpers = min(READERS_MAX, len(os.sched_getaffinity(0))) - 1
        self._pool = ThreadPoolExecutor(max(1, self._helpers), thread_name_prefix="chunk-store-read")

    def write(self, blob: str, header: EntryHeader, views: Sequence[memoryview]) -> None:
        try:
            fd = self._create(blob)
            try:
                self._fill(fd, header, views)
                check_headroom(fd)
                if self._durability is Durability.POWER:
                    os.fsync(fd)
            finally:
                os.close(fd)
            if self._durability is Durability.POWER:
                sync_directory(self._path(blob).parent)
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise NoSpace(f"{self._data}: {error.strerror}") from error
            raise StoreUnavailable(f"cannot write {self._path(blob)}: {error.strerror}") from error

    def read(self, blob: str, expected: Expected, landing: Landing) -> None:
        try:
            fd = os.open(self._path(blob), os.O_RDONLY)
            try:
                frame = read_frame(fd)
                expected.check(frame, landing.sizes)
                self._read_pieces(fd, frame, landing)
            finally:
                os.close(fd)
        except OSError as error:
            raise _read_error(error, blob) from error

    def frame(self, blob: str) -> Frame:
        try:
            fd = os.open(self._path(blob), os.O_RDONLY)
            try:
                return read_frame(fd)
            finally:
                os.close(fd)
        except OSError as error:
            raise _read_error(error, blob) from error

    def remove(self, blobs: Sequence[str]) -> list[str]:
        for blob in blobs:
            for path in (self._path(blob), self._quarantine / blob):
                try:
                    os.unlink(path)
                except (FileNotFoundError, NotADirectoryError):
                    continue
                except OSError as error:
                    raise StoreUnavailable(f"cannot remove {path}: {error.strerror}") from error
        return list(blobs)

    def quarantine(self, blob: str) -> str:
        place = self._path(blob)
        with suppress(OSError):
            make_directory(self._quarantine)
            os.replace(place, self._quarantine / blob)
            place = self._quarantine / blob
        return f"file {place}"

    def quarantined(self) -> list[Quarantined]:
        found = []
        with suppress(FileNotFoundError, NotADirectoryError):
            for item in os.scandir(self._quarantine):
                with suppress(OSError):
                    status = item.stat()
                    found.append(Quarantined(item.name, status.st_size, status.st_ctime))
        return found

    def names(self) -> Iterator[tuple[str, int]]:
        with suppress(FileNotFoundError):
            for folder in sorted(os.listdir(self._data)):
                with suppress(FileNotFoundError, NotADirectoryError):
                    for item in os.scandir(self._data / folder):
                        with suppress(FileNotFoundError):
                            yield item.name, item.stat().st_size

    def close(self) -> None:
        self._pool.shutdown()

    def _path(self, blob: str) -> Path:
        return Path(f"{self._data}/{blob[:2]}/{blob}")

    def _read_pieces(self, fd: int, frame: Frame, landing: Landing) -> None:
        """Verification costs half as much as reading: a large entry is shared out over the processors.

        Whoever is free takes the next piece, so that reads beside each other keep as many threads busy as there are.
        """
        pieces = pieces_of(frame.sizes, frame.block_nbytes, landing.piece_nbytes)
        shares = min(self._helpers + 1, SHARES_MAX, frame.stored_nbytes // SHARE_NBYTES_MIN, len(pieces))
        left = SharedPieces(pieces)
        others = [self._pool.submit(read_data, fd, frame, landing, left) for _ in range(shares - 1)]
        try:
            read_data(fd, frame, landing, left)
        finally:
            left.clear()
            ended = [other.exception() for other in others if not other.cancel()]  # nobody writes there after this call
        for error in ended:
            if error is not None:
                raise error

    def _create(self, blob: str) -> int:
        path = self._path(blob)
        flags = os.O_EXCL | os.O_WRONLY
        try:
            return create_file(path, flags)
        except FileNotFoundError:
            for folder in (self._data.parent, self._data, path.parent):
                make_directory(folder)
            return create_file(path, flags)

    def _fill(self, fd: int, header: EntryHeader, views: Sequence[memoryview]) -> None:
        """Another thread hashes while this one writes; what it has not come to when all is written is hashed here.

        A second thread that wrote, too, would wait: one file is written by one at a time.
        """
        batches = list(batches_of(split_blocks(views, BLOCK_NBYTES)))
        hashing = BatchHashing(batches)
        helps = self._helpers and header.nbytes >= SHARE_NBYTES_MIN
        other = self._pool.submit(hashing.run) if helps else None
        try:
            offset = header_nbytes(header)
            for batch in batches:
                offset = write_all(fd, batch, offset)
            hashing.run()
        finally:
            hashing.stop()
            failed = None if other is None or other.cancel() else other.exception()
        if failed is not None:
            raise failed
        write_all(fd, [memoryview(encode_header(header, hashing.checksums()))], 0)


def _read_error(error: OSError, blob: str) -> Exception:
    if error.errno in (errno.ENOENT, errno.ENOTDIR):
        return BlobMissing(blob)
    return BlobUnreadable(f"{blob}: {error.strerror}")
