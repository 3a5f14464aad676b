"""The bytes of a stored entry: a header that says what the data is, and a checksum for each block of it.

    entry   = prefix | fields | zeros up to a multiple of 4096 | data
    prefix  = magic "CAIRN-KV" | version u32 | length of fields u32 | xxh3-64 of fields u64      (little-endian)
    fields  = each field behind its length as u32, in this order:
              key, chunk id, model, layout, token ids (u32 each), context (length-prefixed keys), salt digest,
              block size (u32), checksums (xxh3-64 of each block, u64 each)
    data    = the layout's planes (each layer's K, then V) back to back; blocks never span two planes

Written down in docs/store_format.md and pinned by a golden file. This module turns headers into bytes and back
and checks blocks; it does not know where entries are kept. Nothing here executes what it reads.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import xxhash

from chunk_store.entry import EntryHeader
from chunk_store.errors import BlobBad, BlobOtherVersion
from chunk_store.format.versions import ENTRY_VERSION
from chunk_store.key import ChunkId, ChunkKey, ModelIdentity, pack_token_ids, unpack_token_ids
from chunk_store.layout import KVLayout

MAGIC = b"CAIRN-KV"
ALIGN_NBYTES = 4096
BLOCK_NBYTES = 2 * 2**20  # of what is written; each entry says what its own are
HEADER_NBYTES_MAX = 256 * 2**20
ALONE_NBYTES_MIN = 100_000  # less is hashed before another thread could take over
FIELDS = 9

_PREFIX = struct.Struct("<8sIIQ")
_U32 = struct.Struct("<I")


@dataclass(frozen=True)
class Frame:
    """A decoded header: what the entry says of itself, and how to check its data."""

    header: EntryHeader
    data_offset: int
    block_nbytes: int
    checksums: tuple[int, ...]
    sizes: tuple[int, ...]  # bytes of each plane

    @property
    def stored_nbytes(self) -> int:
        """Bytes of header and data together."""
        return self.data_offset + sum(self.sizes)


def checksum(data: bytes | memoryview) -> int:
    """xxh3-64 of ``data``."""
    if len(data) < ALONE_NBYTES_MIN:
        return xxhash.xxh3_64_intdigest(data)
    hasher = xxhash.xxh3_64()  # its ``update`` lets other threads run meanwhile; the one-call function does not
    hasher.update(data)
    return hasher.intdigest()


def flat_views(buffers: Sequence[memoryview], sizes: Sequence[int]) -> list[memoryview]:
    """``buffers`` as flat bytes. Raises ``ValueError`` where they are not C-contiguous or not of ``sizes``."""
    views = [_flat(buffer) for buffer in buffers]
    found = [view.nbytes for view in views]
    if found != list(sizes):
        raise ValueError(f"buffers: the layout wants planes of {list(sizes)} bytes, got {found}")
    return views


def writable_views(buffers: Sequence[memoryview]) -> list[memoryview]:
    """``buffers`` as flat bytes to be written. Raises ``ValueError`` where they cannot be."""
    if any(buffer.readonly for buffer in buffers):
        raise ValueError("buffers: every buffer must be writable")
    return [_flat(buffer) for buffer in buffers]


def _flat(buffer: memoryview) -> memoryview:
    if not buffer.c_contiguous:
        raise ValueError("buffers: every buffer must be C-contiguous")
    return buffer if buffer.format == "B" and buffer.ndim == 1 else buffer.cast("B")


def split_blocks(views: Sequence[memoryview], block_nbytes: int) -> Iterator[memoryview]:
    """The blocks of ``views`` in file order: at most ``block_nbytes`` each, none spans two planes."""
    for view in views:
        for start in range(0, view.nbytes, block_nbytes):
            yield view[start : start + block_nbytes]


def block_count(sizes: Sequence[int], block_nbytes: int) -> int:
    """How many blocks planes of ``sizes`` bytes have."""
    if max(sizes, default=0) <= block_nbytes:
        return len(sizes) - sizes.count(0)
    return sum(-(-size // block_nbytes) for size in sizes)


def header_nbytes(header: EntryHeader) -> int:
    """Bytes before the data in this version's encoding; known before the data is."""
    blocks = block_count(header.layout.plane_nbytes(len(header.token_ids)), BLOCK_NBYTES)
    texts = (header.key, header.chunk_id, header.model, header.layout.canonical(), header.salt_digest)
    fields = sum(len(text.encode()) for text in texts) + 4 * len(header.token_ids) + _U32.size + 8 * blocks
    context = sum(_U32.size + len(key.encode()) for key in header.context)
    return _aligned(_PREFIX.size + FIELDS * _U32.size + fields + context)


def encode_header(header: EntryHeader, checksums: Sequence[int]) -> bytes:
    """Prefix, fields and padding, for data in blocks of ``BLOCK_NBYTES``."""
    fields = _join(
        header.key.encode(),
        header.chunk_id.encode(),
        header.model.encode(),
        header.layout.canonical().encode(),
        pack_token_ids(header.token_ids),
        _join(*(key.encode() for key in header.context)),
        header.salt_digest.encode(),
        _U32.pack(BLOCK_NBYTES),
        struct.pack(f"<{len(checksums)}Q", *checksums),
    )
    prefix = _PREFIX.pack(MAGIC, ENTRY_VERSION, len(fields), checksum(fields))
    return _padded(prefix + fields)


def fields_end(start: bytes | memoryview) -> int:
    """Where the fields end, from an entry's first bytes. Raises ``BlobBad`` for a foreign format or version."""
    if len(start) < _PREFIX.size:
        raise BlobBad(f"the entry has {len(start)} bytes, less than a header's prefix")
    magic, version, length, _ = _PREFIX.unpack_from(start)
    if magic != MAGIC:
        raise BlobBad(f"the entry starts with {magic!r}, not {MAGIC!r}: not written by this store")
    if version != ENTRY_VERSION:
        age = "older" if version < ENTRY_VERSION else "newer"
        raise BlobOtherVersion(
            f"format version {version}, written by {age} software; this software reads version {ENTRY_VERSION}"
        )
    if length > HEADER_NBYTES_MAX:
        raise BlobBad(f"the header claims {length} bytes, over the limit of {HEADER_NBYTES_MAX}")
    return _PREFIX.size + int(length)


def decode_header(raw: bytes | memoryview) -> Frame:
    """The header at the start of ``raw``. Raises ``BlobBad`` if it is cut, foreign or damaged."""
    end = fields_end(raw)
    fields = bytes(raw[_PREFIX.size : end])
    if len(fields) != end - _PREFIX.size:
        raise BlobBad(f"the header is cut: {len(fields)} of {end - _PREFIX.size} bytes")
    if checksum(fields) != _PREFIX.unpack_from(raw)[3]:
        raise BlobBad("the header's checksum does not match")
    values = _split(fields)
    if len(values) != FIELDS:
        raise BlobBad(f"the header has {len(values)} fields, expected {FIELDS}")
    try:
        return _frame(values, _aligned(end))
    except (ValueError, TypeError, struct.error) as error:
        raise BlobBad(f"the header's fields do not decode: {error}") from error


def _frame(fields: list[bytes], data_offset: int) -> Frame:
    key, chunk, model, layout, tokens, context, salt, block, sums = fields
    token_ids = unpack_token_ids(tokens)
    header = EntryHeader(
        key=ChunkKey(key.decode()),
        chunk_id=ChunkId(chunk.decode()),
        model=ModelIdentity(model.decode()),
        layout=KVLayout.from_canonical(layout.decode()),
        token_ids=token_ids,
        context=tuple(ChunkKey(name.decode()) for name in _split(context)),
        salt_digest=salt.decode(),
    )
    (block_nbytes,) = _U32.unpack(block)
    if block_nbytes == 0:
        raise ValueError("block size 0")
    sizes = tuple(header.layout.plane_nbytes(len(token_ids)))
    checksums = struct.unpack(f"<{len(sums) // 8}Q", sums)
    if len(checksums) != block_count(sizes, block_nbytes):
        raise ValueError(f"{len(checksums)} checksums")
    return Frame(header, data_offset, block_nbytes, checksums, sizes)


def _join(*fields: bytes) -> bytes:
    return b"".join(_U32.pack(len(field)) + field for field in fields)


def _split(joined: bytes) -> list[bytes]:
    fields, at = [], 0
    while at < len(joined):
        if at + _U32.size > len(joined):
            raise BlobBad("a field's length is cut")
        (length,) = _U32.unpack_from(joined, at)
        at += _U32.size
        if at + length > len(joined):
            raise BlobBad("a field is longer than the header")
        fields.append(joined[at : at + length])
        at += length
    return fields


def _aligned(nbytes: int) -> int:
    return -(-nbytes // ALIGN_NBYTES) * ALIGN_NBYTES


def _padded(raw: bytes) -> bytes:
    return raw.ljust(_aligned(len(raw)), b"\0")
