"""Chosen chunks as one file that another installation can import.

An archive is an uncompressed tar (docs/store_format.md): ``manifest.json`` first, then ``records/CHUNK_ID.json``, then
``entries/KEY.kv`` in the stored format with its checksums. An import reads members as bytes; it never extracts a
file, and every entry is verified before it is published: ``archive_members.py`` says how far, ``archive_file.py`` what
a signature adds.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, cast

from chunk_store.blobs import Expected
from chunk_store.entry import EntryHeader, EntryInfo
from chunk_store.errors import BlobBad, BlobMissing, BlobUnreadable
from chunk_store.format.header import BLOCK_NBYTES, checksum, encode_header, split_blocks
from chunk_store.key import ChunkId, ChunkKey
from chunk_store.landing import Buffers
from chunk_store.local.private_files import create_file
from chunk_store.shared_store import SharedStore
from chunk_store.store import Busy, Stored
from chunk_store.tenant import DEFAULT_TENANT, SHARED_SALT, SHARED_TENANT, Tenant
from chunk_store.tools.archive_file import (
    ArchiveError,
    Member,
    MemberRefused,
    check_signature,
    each_member,
    next_member,
    read_member,
    signature,
    signature_path,
    skip_member,
    write_end,
    write_member,
)
from chunk_store.tools.archive_members import (
    MANIFEST_NBYTES_MAX,
    RECORD_NBYTES_MAX,
    UNKNOWN_TENANT,
    check_entry_content,
    check_entry_key,
    decode_entry,
    decode_manifest,
    decode_record,
    encode_manifest,
    encode_record,
    member_of,
    tokens_digest,
)

REFUSED_MAX = 1000  # an archive with more of them is given up


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


def export(
    store: SharedStore, path: Path, chunk_ids: Sequence[ChunkId], *, sign_key: bytes | None = None
) -> ExportReport:
    """Writes the chunks, their entries, and all that those were computed under (records and KV) to ``path``.

    It is the operator's: whoever the chunks belong to, and each record and entry keeps its tenant.
    With ``sign_key`` its signature is written beside it (``FILE.sig``). The file appears when it is complete, for its
    owner alone to read. Raises ``ArchiveError`` for an entry that cannot be read, ``StoreUnavailable``, or ``OSError``
    from writing ``path``.
    """
    entries = _with_context(store, store.list_entries(chunk_ids, None) if chunk_ids else [])
    wanted = list(dict.fromkeys([*chunk_ids, *(info.chunk_id for info in entries)]))
    found = (store.get_records(wanted, [tenant]) for tenant in store.tenants())
    records = [record for mine in found for record in mine if record is not None]
    known = {record.chunk_id for record in records}
    entries = [info for info in entries if info.chunk_id in known]  # an import refuses what no record vouches for
    partial = path.with_name(path.name + ".partial")
    nbytes = 0
    try:
        partial.unlink(missing_ok=True)
        with (
            store.lease([info.key for info in entries], ttl_s=3600),
            os.fdopen(create_file(partial, os.O_EXCL | os.O_RDWR), "w+b") as opened,
        ):
            file = cast(BinaryIO, opened)
            write_member(file, "manifest.json", encode_manifest(len(records) + len(entries)))
            for record in records:
                write_member(file, member_of(record), encode_record(record))
            for info in entries:
                raw = _entry_bytes(store, info.key)
                if raw is None:
                    raise ArchiveError(f"entry {info.key} cannot be read", "verify the store, then export again")
                write_member(file, f"entries/{info.key}.kv", raw)
                nbytes += len(raw)
            write_end(file)
            file.flush()
            _sign(file, path, sign_key)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
    return ExportReport(len(records), len(entries), nbytes, tuple(name for name in chunk_ids if name not in known))


def _sign(file: BinaryIO, path: Path, key: bytes | None) -> None:
    """Writes the signature's file; without a key an older one goes, which would not fit any more."""
    signature_path(path).unlink(missing_ok=True)
    if key is not None:
        with os.fdopen(create_file(signature_path(path), os.O_EXCL | os.O_WRONLY), "w") as signed:
            signed.write(signature(file, key) + "\n")


def import_(
    store: SharedStore, path: Path, *, verify_key: bytes | None = None, salts: Mapping[Tenant, str] | None = None
) -> ImportReport:
    """Registers and publishes what ``path`` holds and the store does not have yet.

    With ``verify_key`` the archive must be signed with it, which is checked before anything is read. Without, a key
    is checked against its content, and its KV bytes are those of whoever made the archive. ``salts`` are those of
    tenants; of entries under another salt the key cannot be checked, so that only a signed archive may bring another
    tenant's records and entries. Raises ``ArchiveError``, ``StoreFull``, ``StoreUnavailable``; what was imported before
    that stays.
    """
    with open(path, "rb") as file:
        if verify_key is not None:
            check_signature(file, path, verify_key)
        known = {DEFAULT_TENANT: "", SHARED_TENANT: SHARED_SALT, **(salts or {})}
        running = _Import(store, known, signed=verify_key is not None)
        try:
            members = _read_manifest(file)
            for member in each_member(file):
                running.take(file, member)
        except ArchiveError as error:
            raise ArchiveError(f"{path}: {error}") from error
    if running.seen != members:
        raise ArchiveError(f"{path}: holds {running.seen} members, its manifest says {members}: it is cut")
    return running.report()


class _Import:
    """One import as it goes: what came in, what was known, what was refused."""

    def __init__(self, store: SharedStore, salts: Mapping[Tenant, str], *, signed: bool) -> None:
        self._store = store
        self._salts = salts
        self._signed = signed
        self._capacity_nbytes = store.stats().capacity_nbytes
        self._tokens: dict[ChunkId, str] = {}  # digest of each chunk's tokens, as the archive's records have them
        self._refused: list[str] = []
        self._records = self._entries = self._nbytes = self._known = 0
        self.seen = 0

    def take(self, file: BinaryIO, member: Member) -> None:
        """Raises ``ArchiveError`` for what belongs in no archive; notes what does not verify and goes on."""
        self.seen += 1
        folder, _, _ = member.name.partition("/")
        if folder not in ("records", "entries"):
            raise ArchiveError(f"unexpected member {member.name!r}")
        largest = RECORD_NBYTES_MAX if folder == "records" else self._capacity_nbytes
        try:
            if member.nbytes > largest:
                skip_member(file, member)
                raise MemberRefused(f"{member.nbytes} bytes are more than {largest}")
            raw = read_member(file, member)
            if folder == "records":
                new = self._record(raw)
                self._records += new
            else:
                new = self._entry(raw)
                self._entries += new
                self._nbytes += len(raw) if new else 0
            self._known += not new
        except (MemberRefused, BlobBad) as error:
            self._refused.append(f"{member.name}: {error}")
            if len(self._refused) > REFUSED_MAX:
                words = f"more than {REFUSED_MAX} members do not verify, the last: {self._refused[-1]}"
                raise ArchiveError(words) from error

    def report(self) -> ImportReport:
        return ImportReport(self._records, self._entries, self._nbytes, self._known, tuple(self._refused))

    def _record(self, raw: bytes) -> bool:
        """A record the store knows keeps its own name, tags and pin."""
        record = decode_record(raw)
        if not self._signed and record.tenant not in self._salts:
            raise MemberRefused(f"it belongs to a tenant that is not known here: {UNKNOWN_TENANT}")
        self._tokens[record.chunk_id] = tokens_digest(record.token_ids)
        if self._store.get_records([record.chunk_id], [record.tenant])[0] is not None:
            return False
        self._store.put_records([record])
        return True

    def _entry(self, raw: bytes) -> bool:
        header, views = decode_entry(raw)
        if not self._signed or header.salt_digest in self._salts:
            check_entry_key(header, self._salts)
        self._check_content(header)
        publication = self._store.begin(header.key)
        if isinstance(publication, Stored | Busy):
            return False
        with publication:
            publication.write(header, views)
            publication.commit()
        return True

    def _check_content(self, header: EntryHeader) -> None:
        found = self._tokens.get(header.chunk_id)
        if found is None:
            record = self._store.get_records([header.chunk_id], None)[0]
            found = tokens_digest(record.token_ids) if record else None
        check_entry_content(header, found)


def _read_manifest(file: BinaryIO) -> int:
    """How many members follow. Raises ``ArchiveError``."""
    first = next_member(file)
    if first is None or first.name != "manifest.json" or first.nbytes > MANIFEST_NBYTES_MAX:
        raise ArchiveError("not an archive, or cut: it does not start with manifest.json")
    return decode_manifest(read_member(file, first))


def _with_context(store: SharedStore, entries: Sequence[EntryInfo]) -> list[EntryInfo]:
    """``entries`` and the stored entries they were computed under, each once."""
    found = {info.key: info for info in entries}
    for info in entries:
        for other in store.lookup(_context_of(store, info.key)):
            if other is not None:
                found.setdefault(other.key, other)
    return list(found.values())


def _context_of(store: SharedStore, key: ChunkKey) -> tuple[ChunkKey, ...]:
    placed = store.ledger.entries.locate(key)
    if placed is None:
        return ()
    try:
        return store.blobs.frame(placed.blob).header.context
    except (BlobMissing, BlobBad, BlobUnreadable):
        return ()


def _entry_bytes(store: SharedStore, key: ChunkKey) -> bytes | None:
    """An entry in the stored format, verified; None when it is gone or bad."""
    placed = store.ledger.entries.locate(key)
    if placed is None:
        return None
    try:
        header = store.blobs.frame(placed.blob).header
        buffers = [bytearray(size) for size in header.layout.plane_nbytes(len(header.token_ids))]
        views = [memoryview(buffer) for buffer in buffers]
        store.blobs.read(placed.blob, Expected(key, header.token_ids), Buffers(views))
    except (BlobMissing, BlobBad, BlobUnreadable):
        return None
    checksums = [checksum(block) for block in split_blocks(views, BLOCK_NBYTES)]
    return b"".join([encode_header(header, checksums), *buffers])
