"""Blobs on a server of named values: the header and each 2 MiB of data is one value.

    BLOB:h   header      BLOB:0, BLOB:1, ...   data (chunk_store/format/values.py)

Such stores cannot cheaply list what they hold, so Redis keeps a catalogue: blob -> number of values and stored bytes,
written before the first value and dropped after the last one is removed. What holds the values is behind ``Values``.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import suppress
from typing import Protocol

from chunk_store.blobs import Expected, Quarantined
from chunk_store.entry import EntryHeader
from chunk_store.errors import BlobBad, BlobMissing, BlobUnreadable, NoSpace
from chunk_store.format.header import BLOCK_NBYTES, Frame, checksum, encode_header, header_nbytes, split_blocks
from chunk_store.format.values import (
    VALUE_NBYTES,
    batches_of,
    check_value,
    framed,
    targets_of,
    value_count,
    values_of,
)
from chunk_store.landing import Landing
from chunk_store.redis.connection import RedisConnection, ServerFull
from chunk_store.redis.mending import names_below

VALUES_IN_FLIGHT = 4


class Values(Protocol):
    """Named values in one place. Batches are bounded by the caller."""

    @property
    def kind(self) -> str:
        """The backend's name in statistics."""

    def put(self, values: Sequence[tuple[str, Sequence[memoryview | bytes]]]) -> None:
        """Stores new values, each given in spans. Raises ``NoSpace`` or ``StoreUnavailable``."""

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


class ValueBlobs:
    """The ``Blobs`` of one ``Values`` and its catalogue; closing it closes both."""

    def __init__(self, values: Values, catalogue: RedisConnection) -> None:
        self._values = values
        self._redis = catalogue
        self._catalogue = catalogue.name("catalogue")

    @property
    def kind(self) -> str:
        return self._values.kind

    def write(self, blob: str, header: EntryHeader, views: Sequence[memoryview]) -> None:
        values = list(values_of(views))
        self._note(blob, f"{len(values)} {header_nbytes(header) + header.nbytes}")
        checksums: list[int] = []
        waiting: list[tuple[str, Sequence[memoryview | bytes]]] = []
        for number, spans in enumerate(values):
            if len(waiting) == VALUES_IN_FLIGHT:
                self._values.put(waiting)
                waiting = []
            checksums += [checksum(block) for block in split_blocks(spans, BLOCK_NBYTES)]
            waiting.append((self._name(blob, number), spans))
        self._values.finish(waiting, (self._name(blob, "h"), encode_header(header, checksums)))

    def read(self, blob: str, expected: Expected, landing: Landing) -> None:
        batches = batches_of(landing.sizes, min(landing.piece_nbytes, VALUES_IN_FLIGHT * VALUE_NBYTES))
        frame: Frame | None = None
        checksums: Iterator[int] = iter(())
        for batch in batches:
            with landing.piece(batch.start, batch.nbytes) as views:
                targets, names = targets_of(views, batch), self._names(blob, batch.numbers)
                if frame is None:  # the header comes with the first values
                    raw, sizes = self._values.read(self._name(blob, "h"), names, targets)
                    if raw is None:
                        raise BlobMissing(blob)
                    frame = framed(raw)
                    expected.check(frame, landing.sizes)
                    checksums = iter(frame.checksums)
                else:
                    sizes = self._values.read_more(names, targets)
                for spans, size in zip(targets, sizes, strict=True):
                    check_value(spans, size, frame.block_nbytes, checksums)

    def frame(self, blob: str) -> Frame:
        raw = self._values.header(self._name(blob, "h"))
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
            values = int(entry.split()[0]) if entry else self._value_count(blob)
            if self._values.remove(self._name(blob, "h"), self._names(blob, range(values))):
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
            blob, _, suffix = name.removeprefix("blob:").rpartition(":")
            with self._redis.errors():
                lost = suffix == "h" and not self._redis.client.hexists(self._catalogue, blob)
            if lost:
                with suppress(BlobBad, BlobMissing, BlobUnreadable):
                    yield blob, self.frame(blob).stored_nbytes

    def close(self) -> None:
        self._values.close()
        self._redis.close()

    def _name(self, blob: str, suffix: str | int) -> str:
        return f"{self._redis.prefix}blob:{blob}:{suffix}"

    def _value_count(self, blob: str) -> int:
        """How many values a blob has that is not in the catalogue; 0 where its header does not say."""
        try:
            frame = self.frame(blob)
        except (BlobBad, BlobMissing, BlobUnreadable):
            return 0
        return value_count(frame.sizes)

    def _names(self, blob: str, numbers: range) -> list[str]:
        return [self._name(blob, number) for number in numbers]

    def _note(self, blob: str, entry: str) -> None:
        try:
            with self._redis.errors():
                self._redis.client.hset(self._catalogue, blob, entry)
        except ServerFull as error:
            raise NoSpace(str(error)) from error
