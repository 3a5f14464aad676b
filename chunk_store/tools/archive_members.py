"""What stands in an archive's members: a manifest, records, entries. Nothing that is read here is believed.

A record's chunk id must be the digest of its tokens, an entry's key the digest of its model, context and tokens, and an
entry's chunk id that of a record with the same tokens. What no digest covers are the KV bytes: their checksums find
accidents, not forgeries. Whoever imports an archive trusts who made it, and can ask for a signature.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from chunk_store.entry import EntryHeader
from chunk_store.errors import BlobBad
from chunk_store.format.header import Frame, checksum, decode_header, split_blocks
from chunk_store.format.versions import ARCHIVE_VERSION
from chunk_store.key import ChunkId, ChunkType, TokenizerIdentity, chunk_id, chunk_key, digest, pack_token_ids
from chunk_store.record import ChunkRecord
from chunk_store.tenant import DEFAULT_TENANT, Tenant
from chunk_store.tools.archive_file import ArchiveError, MemberRefused

ARCHIVE_FORMAT = "cairn-archive"
MANIFEST_NBYTES_MAX = 4096
RECORD_NBYTES_MAX = 16 * 2**20
LABEL_CHARACTERS_MAX = 256
TAGS_MAX = 1024
UNKNOWN_TENANT = "give the services' token file (--token-file), or import a signed archive (--verify-key)"

_NAME = re.compile(r"[0-9a-f]{64}")
_CONTROL = re.compile(r"[\x00-\x1f\x7f]")


def encode_manifest(members: int) -> bytes:
    return json.dumps({"format": ARCHIVE_FORMAT, "version": ARCHIVE_VERSION, "members": members}).encode()


def decode_manifest(raw: bytes) -> int:
    """How many members follow. Raises ``ArchiveError``."""
    try:
        manifest = json.loads(raw)
        found = (manifest["format"], manifest["version"])
        members = manifest["members"]
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise ArchiveError(f"manifest.json does not decode: {_short(error)}") from error
    if found != (ARCHIVE_FORMAT, ARCHIVE_VERSION) or type(members) is not int:
        wanted = (ARCHIVE_FORMAT, ARCHIVE_VERSION)
        raise ArchiveError(f"format and version {_short(found)}; this software reads {wanted}")
    return members


def member_of(record: ChunkRecord) -> str:
    """The name of a record's member; whose it is stands inside."""
    tenant = f"{record.tenant[:16]}." if record.tenant else ""
    return f"records/{tenant}{record.chunk_id}.json"


def encode_record(record: ChunkRecord) -> bytes:
    return json.dumps(asdict(record)).encode()


def decode_record(raw: bytes) -> ChunkRecord:
    """Raises ``MemberRefused``; the chunk id must be the digest of what it names."""
    try:
        fields = json.loads(raw)
        record = ChunkRecord(
            chunk_id=ChunkId(_label(fields, "chunk_id")),
            tokenizer=TokenizerIdentity(_label(fields, "tokenizer")),
            type=ChunkType(_label(fields, "type")),
            token_ids=_token_ids(fields),
            name=_label(fields, "name"),
            tags=_tags(fields),
            pinned=_typed(fields, "pinned", bool),
            created_at=_time(fields, "created_at"),
            last_used_at=_time(fields, "last_used_at"),
            expires_at=None if fields["expires_at"] is None else _time(fields, "expires_at"),
            transient=_transient(fields),
            tenant=Tenant(_plain(fields.get("tenant", DEFAULT_TENANT), "tenant")),  # an older archive names none
        )
        expected = chunk_id(record.tokenizer, record.type, record.token_ids)
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise MemberRefused(f"the record does not decode: {_short(error)}") from error
    if record.chunk_id != expected:
        raise MemberRefused(f"the record's tokens have the id {expected}, not {record.chunk_id}")
    return record


def decode_entry(raw: bytes) -> tuple[EntryHeader, list[memoryview]]:
    """Header and planes, every block compared with its checksum. Raises ``MemberRefused``, ``BlobBad``."""
    frame = decode_header(raw)
    header = frame.header
    for name in (header.key, header.chunk_id, *header.context):
        if not _NAME.fullmatch(name):
            raise MemberRefused(f"{_short(name)} is no name of a chunk or its KV: 64 hexadecimal digits are")
    if not header.model or len(header.model) > LABEL_CHARACTERS_MAX or _CONTROL.search(header.model):
        raise MemberRefused("the header's model identity is empty, too long, or not plain text")
    return header, _checked_views(frame, memoryview(raw))


def check_entry_key(header: EntryHeader, salts: Mapping[Tenant, str]) -> None:
    """Raises ``MemberRefused`` unless model, context and tokens give the key. ``salts`` are those of tenants."""
    salt = salts.get(header.tenant)
    if salt is None:
        raise MemberRefused(
            f"its key depends on a salt that is not known here, so nothing shows what it is of: {UNKNOWN_TENANT}"
        )
    expected = chunk_key(header.model, header.context, header.token_ids, salt)
    if header.key != expected:
        raise MemberRefused(f"its model, context and tokens have the key {expected}, not {header.key}")


def tokens_digest(token_ids: Sequence[int]) -> str:
    """What is kept of a record to compare entries with."""
    return digest("cairn.archive.tokens.v1", [pack_token_ids(token_ids)])


def check_entry_content(header: EntryHeader, registered: str | None) -> None:
    """Raises ``MemberRefused`` unless its chunk is registered (None: it is not) with tokens of this digest."""
    if registered is None:
        raise MemberRefused(f"there is no record of its chunk {header.chunk_id}")
    if registered != tokens_digest(header.token_ids):
        raise MemberRefused(f"its tokens are not those of its chunk {header.chunk_id}")


def _checked_views(frame: Frame, raw: memoryview) -> list[memoryview]:
    if raw.nbytes != frame.stored_nbytes:
        raise BlobBad(f"has {raw.nbytes} bytes, its header says {_short(frame.stored_nbytes)}")
    views, offset = [], frame.data_offset
    for size in frame.sizes:
        views.append(raw[offset : offset + size])
        offset += size
    for block, wanted in zip(split_blocks(views, frame.block_nbytes), frame.checksums, strict=True):
        if checksum(block) != wanted:
            raise BlobBad("a block does not match its checksum")
    return views


def _typed(fields: Mapping[str, Any], name: str, kind: type[Any]) -> Any:
    value = fields[name]
    if type(value) is not kind:
        raise ValueError(f"{name} is not a {kind.__name__}")
    return value


def _label(fields: Mapping[str, Any], name: str) -> str:
    return _plain(_typed(fields, name, str), name)


def _plain(text: Any, name: str) -> str:
    if type(text) is not str or len(text) > LABEL_CHARACTERS_MAX or _CONTROL.search(text):
        raise ValueError(
            f"{name} is not a text of at most {LABEL_CHARACTERS_MAX} characters without control characters"
        )
    text.encode()  # raises for half a surrogate pair
    return text


def _tags(fields: Mapping[str, Any]) -> tuple[str, ...]:
    tags = _typed(fields, "tags", list)
    if len(tags) > TAGS_MAX:
        raise ValueError(f"{len(tags)} tags are more than {TAGS_MAX}")
    return tuple(_plain(tag, "a tag") for tag in tags)


def _transient(fields: Mapping[str, Any]) -> bool:
    """An older archive does not say."""
    return bool(_typed(fields, "transient", bool)) if "transient" in fields else False


def _token_ids(fields: Mapping[str, Any]) -> tuple[int, ...]:
    token_ids = _typed(fields, "token_ids", list)
    if any(type(token) is not int for token in token_ids):
        raise ValueError("token_ids is not a list of integers")
    return tuple(token_ids)


def _time(fields: Mapping[str, Any], name: str) -> float:
    value = fields[name]
    if type(value) not in (int, float) or not 0 <= value < 1e12:  # NaN is not either
        raise ValueError(f"{name} is not a time")
    return float(value)


def _short(value: object) -> str:
    text = str(value)
    return text if len(text) <= 100 else f"{text[:100]}..."
