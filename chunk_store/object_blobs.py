"""Blobs in a store of named values: the header and each piece of at most 2 MiB is one value.

    BLOB:h   header      BLOB:0, BLOB:1, ...   pieces (chunk_store/pieces.py)

Such stores cannot cheaply list what they hold, so Redis keeps a catalogue: blob -> number of pieces and stored bytes,
written before the first value and dropped after the last one is removed. What holds the values is behind ``Objects``.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Protocol

from chunk_store.blobs import BlobMissing, Expected, NoSpace
from chunk_store.header import BLOCK_NBYTES, Frame, checksum, encode_header, header_nbytes, split_blocks
from chunk_store.pieces import fill, framed, joined, pieces_of
from chunk_store.redis_connection import RedisConnection, ServerFull
from chunk_store.store import EntryHeader

PIECES_IN_FLIGHT = 4


class Objects(Protocol):
    """Named values in one place. Batches are bounded by the caller."""

    @property
    def kind(self) -> str:
        """The backend's name in statistics."""

    def put(self, values: Sequence[tuple[str, memoryview | bytes]]) -> None:
        """Stores new values. Raises ``NoSpace`` or ``StoreUnavailable``."""

    def get(self, names: Sequence[str]) -> list[memoryview | bytes | None]:
        """Values by name, None where there is none. Raises ``BlobUnreadable``."""

    def remove(self, names: Sequence[str]) -> bool:
        """Deletes; False when some cannot go yet. Raises ``StoreUnavailable``."""

    def close(self) -> None:
        """Frees handles."""


class ObjectBlobs:
    """The ``Blobs`` of one ``Objects`` and its catalogue; closing it closes both."""

    def __init__(self, objects: Objects, catalogue: RedisConnection) -> None:
        self._objects = objects
        self._redis = catalogue
        self._catalogue = catalogue.name("catalogue")

    @property
    def kind(self) -> str:
        return self._objects.kind

    def write(self, blob: str, header: EntryHeader, views: Sequence[memoryview]) -> None:
        pieces = list(pieces_of(views))
        self._note(blob, f"{len(pieces)} {header_nbytes(header) + header.nbytes}")
        checksums: list[int] = []
        numbered = enumerate(pieces)
        while batch := list(islice(numbered, PIECES_IN_FLIGHT)):
            for _, spans in batch:
                checksums += [checksum(block) for block in split_blocks(spans, BLOCK_NBYTES)]
            values = [(self._name(blob, number), joined(spans)) for number, spans in batch]
            if batch[-1][0] == len(pieces) - 1:
                values.append((self._name(blob, "h"), encode_header(header, checksums)))
            self._objects.put(values)
        if not pieces:
            self._objects.put([(self._name(blob, "h"), encode_header(header, checksums))])

    def read(self, blob: str, expected: Expected, views: Sequence[memoryview]) -> None:
        pieces = list(pieces_of(views))
        batch = list(range(min(PIECES_IN_FLIGHT, len(pieces))))
        names = [self._name(blob, "h"), *(self._name(blob, number) for number in batch)]
        raw, *values = self._objects.get(names)
        if raw is None:
            raise BlobMissing(blob)
        frame = framed(raw)
        expected.check(frame, views)
        checksums = iter(frame.checksums)
        while batch:
            for number, value in zip(batch, values, strict=True):
                if value is None:
                    raise BlobMissing(f"{blob}: piece {number} is gone")
                fill(pieces[number], value, frame.block_nbytes, checksums)
            batch = list(range(batch[-1] + 1, min(batch[-1] + 1 + PIECES_IN_FLIGHT, len(pieces))))
            values = self._objects.get([self._name(blob, number) for number in batch]) if batch else []

    def frame(self, blob: str) -> Frame:
        (raw,) = self._objects.get([self._name(blob, "h")])
        if raw is None:
            raise BlobMissing(blob)
        return framed(raw)

    def remove(self, blobs: Sequence[str]) -> list[str]:
        if not blobs:
            return []
        with self._redis.errors():
            listed = self._redis.client.hmget(self._catalogue, list(blobs))
        gone = []
        for blob, entry in zip(blobs, listed, strict=True):
            pieces = int(entry.split()[0]) if entry else 0
            if self._objects.remove([self._name(blob, "h"), *(self._name(blob, number) for number in range(pieces))]):
                gone.append(blob)
        if gone:
            with self._redis.errors():
                self._redis.client.hdel(self._catalogue, *gone)
        return gone

    def quarantine(self, blob: str) -> None:
        """Nothing is kept: memory on a server is dear. The bad blob goes with the garbage."""

    def names(self) -> Iterator[tuple[str, int]]:
        with self._redis.errors():
            for blob, entry in self._redis.client.hscan_iter(self._catalogue, count=1000):
                yield blob.decode(), int(entry.split()[1])

    def close(self) -> None:
        self._objects.close()
        self._redis.close()

    def _name(self, blob: str, part: str | int) -> str:
        return f"{self._redis.prefix}blob:{blob}:{part}"

    def _note(self, blob: str, entry: str) -> None:
        try:
            with self._redis.errors():
                self._redis.client.hset(self._catalogue, blob, entry)
        except ServerFull as error:
            raise NoSpace(str(error)) from error
