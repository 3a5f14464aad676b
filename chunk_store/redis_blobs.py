"""Blobs in Redis: one hash each, the header in one field and the data in pieces of at most 2 MiB in the others.

    PREFIX:blob:KEY.NONCE   h -> header, n -> stored bytes, 0, 1, 2, ... -> pieces (chunk_store/pieces.py)

Several pieces are in flight at once, in pipelines of bounded size. This module knows nothing of claims or capacity.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import suppress
from itertools import islice

from chunk_store.blobs import BlobMissing, BlobUnreadable, Expected, NoSpace
from chunk_store.header import BLOCK_NBYTES, Frame, checksum, encode_header, split_blocks
from chunk_store.pieces import fill, framed, joined, pieces_of
from chunk_store.redis_connection import RedisConnection, ServerFull
from chunk_store.store import EntryHeader, StoreUnavailable

PIECES_IN_FLIGHT = 4
QUARANTINE_S = 3600


class RedisBlobs:
    """The ``Blobs`` of one Redis server."""

    kind = "redis"

    def __init__(self, connection: RedisConnection) -> None:
        self._redis = connection

    def write(self, blob: str, header: EntryHeader, views: Sequence[memoryview]) -> None:
        try:
            self._write(blob, header, views)
        except ServerFull as error:
            raise NoSpace(str(error)) from error

    def _write(self, blob: str, header: EntryHeader, views: Sequence[memoryview]) -> None:
        checksums: list[int] = []
        pieces = enumerate(pieces_of(views))
        with self._redis.errors():
            while batch := list(islice(pieces, PIECES_IN_FLIGHT)):
                with self._redis.client.pipeline(transaction=False) as pipeline:
                    for number, spans in batch:
                        checksums += [checksum(block) for block in split_blocks(spans, BLOCK_NBYTES)]
                        pipeline.hset(self._name(blob), str(number), joined(spans))
                    pipeline.execute()
            raw = encode_header(header, checksums)
            self._redis.client.hset(self._name(blob), mapping={"h": raw, "n": len(raw) + header.nbytes})

    def read(self, blob: str, expected: Expected, views: Sequence[memoryview]) -> None:
        frame = self.frame(blob)
        expected.check(frame, views)
        checksums = iter(frame.checksums)
        pieces = enumerate(pieces_of(views))
        while batch := list(islice(pieces, PIECES_IN_FLIGHT)):
            found = self._fields(blob, [str(number) for number, _ in batch])
            for (number, spans), raw in zip(batch, found, strict=True):
                if raw is None:
                    raise BlobMissing(f"{blob}: piece {number} is gone")
                fill(spans, raw, frame.block_nbytes, checksums)

    def frame(self, blob: str) -> Frame:
        (raw,) = self._fields(blob, ["h"])
        if raw is None:
            raise BlobMissing(blob)
        return framed(raw)

    def remove(self, blobs: Sequence[str]) -> list[str]:
        if blobs:
            with self._redis.errors():
                self._redis.client.unlink(*(self._name(blob) for blob in blobs))
        return list(blobs)

    def quarantine(self, blob: str) -> None:
        with suppress(StoreUnavailable), self._redis.errors():
            kept = self._redis.name(f"quarantine:{blob}")
            self._redis.client.rename(self._name(blob), kept)
            self._redis.client.expire(kept, QUARANTINE_S)

    def names(self) -> Iterator[tuple[str, int]]:
        start = self._name("")
        with self._redis.errors():
            for key in self._redis.client.scan_iter(match=f"{start}*", count=1000):
                stored = self._redis.client.hget(key, "n")
                yield key.decode().removeprefix(start), int(stored or 0)

    def close(self) -> None:
        self._redis.close()

    def _name(self, blob: str) -> str:
        return self._redis.name(f"blob:{blob}")

    def _fields(self, blob: str, fields: Sequence[str]) -> list[bytes | None]:
        try:
            with self._redis.errors(), self._redis.client.pipeline(transaction=False) as pipeline:
                for field in fields:
                    pipeline.hget(self._name(blob), field)
                found: list[bytes | None] = pipeline.execute()
                return found
        except StoreUnavailable as error:
            raise BlobUnreadable(f"{blob}: {error}") from error
