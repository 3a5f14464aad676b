"""Blobs in Mooncake: the header and each piece of at most 2 MiB is one object.

    PREFIX:KEY.NONCE:h   header      PREFIX:KEY.NONCE:0, 1, 2, ...   pieces

Mooncake cannot list what it holds, so Redis keeps the catalogue: blob -> number of pieces and bytes, written before
the first object and dropped after the last one is removed. Everything lives in the memory of owner processes: when an
owner dies its objects are gone, and what was an entry becomes a miss. This module knows nothing of claims or capacity.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from chunk_store.blobs import BlobMissing, BlobUnreadable, Expected, NoSpace
from chunk_store.header import BLOCK_NBYTES, Frame, checksum, encode_header, header_nbytes, split_blocks
from chunk_store.mooncake_client import (
    NO_AVAILABLE_HANDLE,
    OBJECT_NOT_FOUND,
    REPLICA_IS_NOT_READY,
    pinned_config,
)
from chunk_store.pieces import fill, framed, joined, pieces_of
from chunk_store.redis_connection import RedisConnection
from chunk_store.store import EntryHeader, StoreUnavailable


class MooncakeBlobs:
    """The ``Blobs`` of one Mooncake cluster. Closing it closes ``client``."""

    kind = "mooncake"

    def __init__(self, client: Any, connection: RedisConnection) -> None:
        self._client = client
        self._redis = connection
        self._catalogue = connection.name("catalogue")
        self._config = pinned_config()

    def write(self, blob: str, header: EntryHeader, views: Sequence[memoryview]) -> None:
        checksums: list[int] = []
        pieces = list(pieces_of(views))
        with self._redis.errors():
            stored = header_nbytes(header) + header.nbytes
            self._redis.client.hset(self._catalogue, blob, f"{len(pieces)} {stored}")
        for number, spans in enumerate(pieces):
            checksums += [checksum(block) for block in split_blocks(spans, BLOCK_NBYTES)]
            self._put(self._name(blob, number), joined(spans))
        self._put(self._name(blob, "h"), encode_header(header, checksums))

    def read(self, blob: str, expected: Expected, views: Sequence[memoryview]) -> None:
        frame = self.frame(blob)
        expected.check(frame, views)
        checksums = iter(frame.checksums)
        for number, spans in enumerate(pieces_of(views)):
            fill(spans, self._get(self._name(blob, number)), frame.block_nbytes, checksums)

    def frame(self, blob: str) -> Frame:
        return framed(self._get(self._name(blob, "h")))

    def remove(self, blobs: Sequence[str]) -> list[str]:
        if not blobs:
            return []
        with self._redis.errors():
            listed = self._redis.client.hmget(self._catalogue, list(blobs))
        gone = []
        for blob, entry in zip(blobs, listed, strict=True):
            pieces = int(entry.split()[0]) if entry else 0
            if all([self._remove(self._name(blob, part)) for part in ("h", *range(pieces))]):
                gone.append(blob)
        if gone:
            with self._redis.errors():
                self._redis.client.hdel(self._catalogue, *gone)
        return gone

    def quarantine(self, blob: str) -> None:
        """Nothing: Mooncake cannot rename, so a bad blob is removed as garbage."""

    def names(self) -> Iterator[tuple[str, int]]:
        with self._redis.errors():
            for blob, entry in self._redis.client.hscan_iter(self._catalogue, count=1000):
                yield blob.decode(), int(entry.split()[1])

    def close(self) -> None:
        self._client.close()
        self._redis.close()

    def _name(self, blob: str, part: str | int) -> str:
        return f"{self._redis.prefix}{blob}:{part}"

    def _put(self, name: str, value: memoryview | bytes) -> None:
        code = self._client.put(name, value, self._config)
        if code == NO_AVAILABLE_HANDLE:
            raise NoSpace("mooncake: no owner has room (or none is running)")
        if code != 0:
            raise StoreUnavailable(f"mooncake: put failed with code {code}; an owner or the master is gone")

    def _get(self, name: str) -> memoryview:
        """An object's bytes. Of a dead owner nothing comes while the master still lists it: that is missing too."""
        handle = self._client.get_buffer(name)
        if handle is not None:
            return memoryview(handle).cast("B")
        size = self._client.get_size(name)
        if size < 0 and size != OBJECT_NOT_FOUND:
            raise BlobUnreadable(f"mooncake: the master does not answer (code {size})")
        raise BlobMissing(name)

    def _remove(self, name: str) -> bool:
        """Without regard to Mooncake's own leases: the ledger knows who reads. False when a writer died in the middle
        of this object, which Mooncake removes only after a time."""
        code = self._client.remove(name, True)
        if code == REPLICA_IS_NOT_READY:
            return False
        if code not in (0, OBJECT_NOT_FOUND):
            raise StoreUnavailable(f"mooncake: remove failed with code {code}; the master does not answer")
        return True
