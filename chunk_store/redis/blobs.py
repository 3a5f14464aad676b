"""Blobs on a server of named values: the header and each piece of at most 2 MiB is one value.

    BLOB:h   header      BLOB:0, BLOB:1, ...   pieces (chunk_store/format/values.py)

Such stores cannot cheaply list what they hold, so Redis keeps a catalogue: blob -> number of pieces and stored bytes,
written before the first value and dropped after the last one is removed. What holds the values is behind ``Objects``.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import suppress
from typing import Protocol

from chunk_store.blobs import BlobBad, BlobMissing, BlobUnreadable, Expected, NoSpace, Quarantined
from chunk_store.entry import EntryHeader
from chunk_store.format.header import BLOCK_NBYTES, Frame, checksum, encode_header, header_nbytes, split_blocks
from chunk_store.format.values import check_piece, framed, piece_count, pieces_of
from chunk_store.redis.connection import RedisConnection, ServerFull
from chunk_store.redis.mending import names_below

PIECES_IN_FLIGHT = 4


class Objects(Protocol):
    """Named values in one place. Batches are bounded by the caller."""

    @property
    def kind(self) -> str:
        """The backend's name in statistics."""

    def put(self, values: Sequence[tuple[str, Sequence[memoryview | bytes]]]) -> None:
        """Stores new values, each given in parts. Raises ``NoSpace`` or ``StoreUnavailable``."""

    def finish(self, values: Sequence[tuple[str, Sequence[memoryview | bytes]]], header: tuple[str, bytes]) -> None:
        """Stores the last values and, after them, the header. Raises ``NoSpace`` or ``StoreUnavailable``."""

    def header(self, name: str) -> bytes | None:
        """A header, None where there is none. Raises ``BlobUnreadable``."""

    def read(
        self, header: str, names: Sequence[str], targets: Sequence[Sequence[memoryview]]
    ) -> tuple[bytes | None, list[int | None]]:
        """A header, and the values of ``names`` into ``targets``; returns the values' sizes.

        None where there is no value; a value of another size than its target is not read. Raises ``BlobUnreadable``.
        """

    def read_more(self, names: Sequence[str], targets: Sequence[Sequence[memoryview]]) -> list[int | None]:
        """As ``read``, without a header."""

    def remove(self, header: str, names: Sequence[str]) -> bool:
        """Deletes a header and values; False when some cannot go yet. Raises ``StoreUnavailable``."""

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
        waiting: list[tuple[str, Sequence[memoryview | bytes]]] = []
        for number, spans in enumerate(pieces):
            if len(waiting) == PIECES_IN_FLIGHT:
                self._objects.put(waiting)
                waiting = []
            checksums += [checksum(block) for block in split_blocks(spans, BLOCK_NBYTES)]
            waiting.append((self._name(blob, number), spans))
        self._objects.finish(waiting, (self._name(blob, "h"), encode_header(header, checksums)))

    def read(self, blob: str, expected: Expected, views: Sequence[memoryview]) -> None:
        pieces = list(pieces_of(views))
        batches = [range(at, min(at + PIECES_IN_FLIGHT, len(pieces))) for at in range(0, len(pieces), PIECES_IN_FLIGHT)]
        first = batches[0] if batches else range(0)
        raw, sizes = self._objects.read(self._name(blob, "h"), self._names(blob, first), [pieces[n] for n in first])
        if raw is None:
            raise BlobMissing(blob)
        frame = framed(raw)
        expected.check(frame, views)
        checksums = iter(frame.checksums)
        for batch in batches:
            targets = [pieces[number] for number in batch]
            if batch is not first:
                sizes = self._objects.read_more(self._names(blob, batch), targets)
            for spans, size in zip(targets, sizes, strict=True):
                check_piece(spans, size, frame.block_nbytes, checksums)

    def frame(self, blob: str) -> Frame:
        raw = self._objects.header(self._name(blob, "h"))
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
            pieces = int(entry.split()[0]) if entry else self._pieces(blob)
            if self._objects.remove(self._name(blob, "h"), self._names(blob, range(pieces))):
                gone.append(blob)
        if gone:
            with self._redis.errors():
                self._redis.client.hdel(self._catalogue, *gone)
        return gone

    def quarantine(self, blob: str) -> str:
        """Nothing is kept: memory on a server is dear. The bad blob goes with the garbage."""
        return f"{self.kind} object {self._name(blob, 'h')}, not kept"

    def quarantined(self) -> list[Quarantined]:
        return []

    def names(self) -> Iterator[tuple[str, int]]:
        with self._redis.errors():
            for blob, entry in self._redis.client.hscan_iter(self._catalogue, count=1000):
                yield blob.decode(), int(entry.split()[1])
        for name in names_below(self._redis, "blob:"):  # what the catalogue has lost
            blob, _, part = name.removeprefix("blob:").rpartition(":")
            with self._redis.errors():
                lost = part == "h" and not self._redis.client.hexists(self._catalogue, blob)
            if lost:
                with suppress(BlobBad, BlobMissing, BlobUnreadable):
                    yield blob, self.frame(blob).stored_nbytes

    def close(self) -> None:
        self._objects.close()
        self._redis.close()

    def _name(self, blob: str, part: str | int) -> str:
        return f"{self._redis.prefix}blob:{blob}:{part}"

    def _pieces(self, blob: str) -> int:
        """How many pieces a blob has that is not in the catalogue; 0 where its header does not say."""
        try:
            frame = self.frame(blob)
        except (BlobBad, BlobMissing, BlobUnreadable):
            return 0
        return piece_count(frame.sizes)

    def _names(self, blob: str, numbers: range) -> list[str]:
        return [self._name(blob, number) for number in numbers]

    def _note(self, blob: str, entry: str) -> None:
        try:
            with self._redis.errors():
                self._redis.client.hset(self._catalogue, blob, entry)
        except ServerFull as error:
            raise NoSpace(str(error)) from error
