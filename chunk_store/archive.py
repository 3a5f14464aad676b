"""Chosen chunks as one file that another installation can import.

An archive is an uncompressed tar (docs/store_format.md): ``manifest.json`` first, then ``records/CHUNK_ID.json``, then
``entries/KEY.kv`` in the stored format with its checksums. An import reads members as bytes; it never extracts a
file, and every entry is verified before it is published.
"""

from __future__ import annotations

import io
import json
import os
import tarfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from chunk_store.blobs import BlobBad, BlobMissing, BlobUnreadable, Expected
from chunk_store.header import (
    BLOCK_NBYTES,
    FormatError,
    Frame,
    checksum,
    decode_header,
    encode_header,
    split_blocks,
)
from chunk_store.key import ChunkId, ChunkKey, ChunkType, TokenizerIdentity, chunk_id
from chunk_store.private_files import create_file
from chunk_store.shared_store import SharedStore
from chunk_store.store import Busy, ChunkRecord, EntryInfo, Stored, StoreError
from chunk_store.tenant import DEFAULT_TENANT, Tenant

ARCHIVE_FORMAT = "cairn-archive"
ARCHIVE_VERSION = 1
RECORD_NBYTES_MAX = 64 * 2**20


class ArchiveError(StoreError):
    """The file is no archive that this version reads, or it is cut."""


@dataclass(frozen=True)
class ExportReport:
    """``missing`` are chosen chunks that the store does not know."""

    records: int
    entries: int
    nbytes: int
    missing: tuple[ChunkId, ...]


@dataclass(frozen=True)
class ImportReport:
    """``known`` counts what the store had already; ``refused`` says what did not verify."""

    records: int
    entries: int
    nbytes: int
    known: int
    refused: tuple[str, ...]


def export(store: SharedStore, path: Path, chunk_ids: Sequence[ChunkId]) -> ExportReport:
    """Writes the chunks, their entries, and all that those were computed under (records and KV) to ``path``.

    It is the operator's: whoever the chunks belong to, and each record and entry keeps its owner. The file appears when
    it is complete, for its owner alone to read. Raises ``ArchiveError`` for an entry that cannot be read,
    ``StoreUnavailable``, or ``OSError`` from writing ``path``.
    """
    entries = _with_context(store, store.list_entries(chunk_ids, None) if chunk_ids else [])
    wanted = list(dict.fromkeys([*chunk_ids, *(info.chunk_id for info in entries)]))
    found = (store.get_records(wanted, [tenant]) for tenant in store.tenants())
    records = [record for mine in found for record in mine if record is not None]
    partial = path.with_name(path.name + ".partial")
    nbytes = 0
    try:
        partial.unlink(missing_ok=True)
        with (
            store.lease([info.key for info in entries], ttl_s=3600),
            os.fdopen(create_file(partial, os.O_EXCL | os.O_WRONLY), "wb") as file,
            tarfile.open(fileobj=file, mode="w") as archive,
        ):
            _add(archive, "manifest.json", _manifest(len(records) + len(entries)))
            for record in records:
                _add(archive, _member_of(record), _encode_record(record))
            for info in entries:
                raw = _entry_bytes(store, info.key)
                if raw is None:
                    raise ArchiveError(f"entry {info.key} cannot be read: verify the store, then export again")
                _add(archive, f"entries/{info.key}.kv", raw)
                nbytes += len(raw)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
    known = {record.chunk_id for record in records}
    return ExportReport(len(records), len(entries), nbytes, tuple(name for name in chunk_ids if name not in known))


def import_(store: SharedStore, path: Path) -> ImportReport:
    """Registers and publishes what ``path`` holds and the store does not have yet.

    Raises ``ArchiveError``, ``StoreFull``, ``StoreUnavailable``; what was imported before that stays.
    """
    report = ImportReport(0, 0, 0, 0, ())
    try:
        with tarfile.open(path, "r:") as archive:
            members = _check_manifest(archive)
            while (member := archive.next()) is not None:
                report = _import_member(store, archive, member, report)
    except tarfile.TarError as error:
        raise ArchiveError(f"{path}: not an archive, or cut: {error}") from error
    seen = report.records + report.entries + report.known + len(report.refused)
    if seen != members:
        raise ArchiveError(f"{path}: holds {seen} members, its manifest says {members}: it is cut")
    return report


def _import_member(
    store: SharedStore, archive: tarfile.TarFile, member: tarfile.TarInfo, report: ImportReport
) -> ImportReport:
    folder, _, _ = member.name.partition("/")
    file = archive.extractfile(member) if member.isfile() else None
    if file is None or folder not in ("records", "entries"):
        raise ArchiveError(f"unexpected member {member.name!r}")
    raw = file.read()
    if len(raw) != member.size:
        raise ArchiveError(f"{member.name} is cut")
    try:
        if folder == "records":
            new = _import_record(store, raw)
            return replace(report, records=report.records + new, known=report.known + (not new))
        new = _import_entry(store, raw)
    except (FormatError, BlobBad) as error:
        return replace(report, refused=(*report.refused, f"{member.name}: {error}"))
    nbytes = len(raw) if new else 0
    return replace(report, entries=report.entries + new, nbytes=report.nbytes + nbytes, known=report.known + (not new))


def _import_record(store: SharedStore, raw: bytes) -> bool:
    """A record the store knows keeps its own name, tags and pin."""
    record = _decode_record(raw)
    if store.get_records([record.chunk_id], [record.tenant])[0] is not None:
        return False
    store.put_records([record])
    return True


def _import_entry(store: SharedStore, raw: bytes) -> bool:
    frame = decode_header(raw)
    views = _checked_views(frame, memoryview(raw))
    publication = store.begin(frame.header.key)
    if isinstance(publication, Stored | Busy):
        return False
    with publication:
        publication.write(frame.header, views)
        publication.commit()
    return True


def _checked_views(frame: Frame, raw: memoryview) -> list[memoryview]:
    """The parts of an entry's data, every block compared with its checksum. Raises ``BlobBad``."""
    if raw.nbytes != frame.stored_nbytes:
        raise BlobBad(f"has {raw.nbytes} bytes, its header says {frame.stored_nbytes}")
    views, offset = [], frame.data_offset
    for size in frame.header.layout.buffer_nbytes(len(frame.header.token_ids)):
        views.append(raw[offset : offset + size])
        offset += size
    for block, wanted in zip(split_blocks(views, frame.block_nbytes), frame.checksums, strict=True):
        if checksum(block) != wanted:
            raise BlobBad("a block does not match its checksum")
    return views


def _with_context(store: SharedStore, entries: Sequence[EntryInfo]) -> list[EntryInfo]:
    """``entries`` and the stored entries they were computed under, each once."""
    found = {info.key: info for info in entries}
    for info in entries:
        for other in store.lookup(_context_of(store, info.key)):
            if other is not None:
                found.setdefault(other.key, other)
    return list(found.values())


def _context_of(store: SharedStore, key: ChunkKey) -> tuple[ChunkKey, ...]:
    placed = store.ledger.locate(key)
    if placed is None:
        return ()
    try:
        return store.blobs.frame(placed.blob).header.context
    except (BlobMissing, BlobBad, BlobUnreadable):
        return ()


def _entry_bytes(store: SharedStore, key: ChunkKey) -> bytes | None:
    """An entry in the stored format, verified; None when it is gone or bad."""
    placed = store.ledger.locate(key)
    if placed is None:
        return None
    try:
        header = store.blobs.frame(placed.blob).header
        buffers = [bytearray(size) for size in header.layout.buffer_nbytes(len(header.token_ids))]
        views = [memoryview(buffer) for buffer in buffers]
        store.blobs.read(placed.blob, Expected(key, header.token_ids), views)
    except (BlobMissing, BlobBad, BlobUnreadable):
        return None
    checksums = [checksum(block) for block in split_blocks(views, BLOCK_NBYTES)]
    return b"".join([encode_header(header, checksums), *buffers])


def _manifest(members: int) -> bytes:
    return json.dumps({"format": ARCHIVE_FORMAT, "version": ARCHIVE_VERSION, "members": members}).encode()


def _check_manifest(archive: tarfile.TarFile) -> int:
    """How many members follow. Raises ``ArchiveError``."""
    first = archive.next()
    file = archive.extractfile(first) if first is not None and first.name == "manifest.json" else None
    if file is None or first is None or first.size > RECORD_NBYTES_MAX:
        raise ArchiveError("the archive does not start with manifest.json")
    try:
        manifest = json.loads(file.read())
        found = (manifest["format"], manifest["version"])
        members = manifest["members"]
    except (ValueError, TypeError, KeyError) as error:
        raise ArchiveError(f"manifest.json does not decode: {error}") from error
    if found != (ARCHIVE_FORMAT, ARCHIVE_VERSION) or not isinstance(members, int):
        raise ArchiveError(f"format and version {found}; this software reads {(ARCHIVE_FORMAT, ARCHIVE_VERSION)}")
    return members


def _member_of(record: ChunkRecord) -> str:
    owner = f"{record.tenant}/" if record.tenant else ""
    return f"records/{owner}{record.chunk_id}.json"


def _encode_record(record: ChunkRecord) -> bytes:
    return json.dumps(asdict(record)).encode()


def _decode_record(raw: bytes) -> ChunkRecord:
    """Raises ``FormatError``; the chunk id must be the digest of what it names."""
    try:
        fields = json.loads(raw)
        record = ChunkRecord(
            chunk_id=ChunkId(str(fields["chunk_id"])),
            tokenizer=TokenizerIdentity(str(fields["tokenizer"])),
            type=ChunkType(fields["type"]),
            token_ids=tuple(int(token) for token in fields["token_ids"]),
            name=str(fields["name"]),
            tags=tuple(str(tag) for tag in fields["tags"]),
            pinned=bool(fields["pinned"]),
            created_at=float(fields["created_at"]),
            last_used_at=float(fields["last_used_at"]),
            expires_at=None if fields["expires_at"] is None else float(fields["expires_at"]),
            tenant=Tenant(str(fields.get("tenant", DEFAULT_TENANT))),  # an older archive names none
        )
        expected = chunk_id(record.tokenizer, record.type, record.token_ids)
    except (ValueError, TypeError, KeyError) as error:
        raise FormatError(f"the record does not decode: {error}") from error
    if record.chunk_id != expected:
        raise FormatError(f"the record's tokens have the id {expected}, not {record.chunk_id}")
    return record


def _add(archive: tarfile.TarFile, name: str, raw: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(raw)
    archive.addfile(member, io.BytesIO(raw))
