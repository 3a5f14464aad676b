"""Blobs in Redis: one hash each, the header in one field and the data in pieces of at most 2 MiB in the others.

    PREFIX:blob:KEY.NONCE   h -> header, n -> stored bytes, 0, 1, 2, ... -> pieces (consecutive blocks)

Several pieces are in flight at once, in pipelines of bounded size. This module knows nothing of claims or capacity.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import suppress
from itertools import islice

from chunk_store.blobs import BlobBad, BlobMissing, BlobUnreadable, Expected, NoSpace
from chunk_store.header import BLOCK_NBYTES, FormatError, Frame, checksum, decode_header, encode_header, split_blocks
from chunk_store.redis_connection import RedisConnection, ServerFull
from chunk_store.store import EntryHeader, StoreUnavailable

PIECE_NBYTES = 2 * 2**20
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
        pieces = enumerate(pieces_of(views, BLOCK_NBYTES))
        with self._redis.errors():
            while batch := list(islice(pieces, PIECES_IN_FLIGHT)):
                with self._redis.client.pipeline(transaction=False) as pipeline:
                    for number, blocks in batch:
                        checksums += [checksum(block) for block in blocks]
                        pipeline.hset(self._name(blob), str(number), joined(blocks))
                    pipeline.execute()
            raw = encode_header(header, checksums)
            self._redis.client.hset(self._name(blob), mapping={"h": raw, "n": len(raw) + header.nbytes})

    def read(self, blob: str, expected: Expected, views: Sequence[memoryview]) -> None:
        frame = self.frame(blob)
        expected.check(frame.header, [view.nbytes for view in views])
        checksums = iter(frame.checksums)
        pieces = enumerate(pieces_of(views, frame.block_nbytes))
        while batch := list(islice(pieces, PIECES_IN_FLIGHT)):
            found = self._fields(blob, [str(number) for number, _ in batch])
            for (number, blocks), raw in zip(batch, found, strict=True):
                if raw is None:
                    raise BlobMissing(f"{blob}: piece {number} is gone")
                fill(blocks, raw, checksums)

    def frame(self, blob: str) -> Frame:
        (raw,) = self._fields(blob, ["h"])
        if raw is None:
            raise BlobMissing(blob)
        return framed(raw)

    def remove(self, blobs: Sequence[str]) -> None:
        if blobs:
            with self._redis.errors():
                self._redis.client.unlink(*(self._name(blob) for blob in blobs))

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


def pieces_of(views: Sequence[memoryview], block_nbytes: int) -> Iterator[list[memoryview]]:
    """Blocks in file order, gathered into pieces of at most ``PIECE_NBYTES`` (or one block, if that is larger)."""
    piece: list[memoryview] = []
    nbytes = 0
    for block in split_blocks(views, block_nbytes):
        if piece and nbytes + block.nbytes > PIECE_NBYTES:
            yield piece
            piece, nbytes = [], 0
        piece.append(block)
        nbytes += block.nbytes
    if piece:
        yield piece


def joined(blocks: Sequence[memoryview]) -> bytes:
    """A piece as one value."""
    return b"".join(blocks)


def fill(blocks: Sequence[memoryview], raw: bytes, checksums: Iterator[int]) -> None:
    """Copies a piece to where it belongs, each block compared with its checksum first. Raises ``BlobBad``."""
    source = memoryview(raw)
    if source.nbytes != sum(block.nbytes for block in blocks):
        raise BlobBad(f"a piece has {source.nbytes} bytes, expected {sum(block.nbytes for block in blocks)}")
    at = 0
    for block in blocks:
        part = source[at : at + block.nbytes]
        if checksum(part) != next(checksums):
            raise BlobBad("a block does not match its checksum")
        block[:] = part
        at += block.nbytes


def framed(raw: bytes) -> Frame:
    """A header kept by itself. Raises ``BlobBad``."""
    try:
        frame = decode_header(raw)
    except FormatError as error:
        raise BlobBad(str(error)) from error
    if len(raw) != frame.data_offset:
        raise BlobBad(f"the header has {len(raw)} bytes, expected {frame.data_offset}")
    return frame
