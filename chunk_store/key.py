"""Names of chunks and of their KV: which digest stands for which content.

Two names, never mixed up. A ``ChunkId`` names *content* and is what a client holds. A ``ChunkKey`` names
*KV bytes*: it covers everything those bytes depend on, so the same key means the same bytes in any process
on the same device and software. This module does not know what a model is; it digests what it is given.

Every digest is SHA-256 over length-prefixed fields behind a domain tag, so no two field lists collide by
concatenation and the value is the same under any ``PYTHONHASHSEED``.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Iterable, Sequence
from enum import StrEnum
from typing import NewType

ChunkId = NewType("ChunkId", str)
ChunkKey = NewType("ChunkKey", str)
ModelIdentity = NewType("ModelIdentity", str)
TokenizerIdentity = NewType("TokenizerIdentity", str)

TOKEN_ID_MAX = 2**32 - 1


class ChunkType(StrEnum):
    """What a chunk is for. The type is part of a chunk's id, not of its KV key."""

    SYSTEM_PROMPT = "system_prompt"
    CONTEXT = "context"
    CODE = "code"
    RAG_RESULT = "rag_result"
    QUERY = "query"
    TURN = "turn"  # a query and its answer, as they were generated


def digest(domain: str, fields: Iterable[bytes]) -> str:
    """SHA-256 of ``domain`` and ``fields``, each prefixed by its length as a little-endian uint64.

    Returns 64 lower-case hexadecimal digits.
    """
    state = hashlib.sha256()
    for field in (domain.encode(), *fields):
        state.update(struct.pack("<Q", len(field)))
        state.update(field)
    return state.hexdigest()


def pack_token_ids(token_ids: Sequence[int]) -> bytes:
    """Token ids as little-endian uint32. Raises ``ValueError`` for an id outside 0..2**32-1."""
    try:
        return struct.pack(f"<{len(token_ids)}I", *token_ids)
    except struct.error as error:
        raise ValueError(f"token_ids: every id must be in 0..{TOKEN_ID_MAX} ({error})") from error


def unpack_token_ids(packed: bytes) -> tuple[int, ...]:
    """Inverse of ``pack_token_ids``. Raises ``ValueError`` if the length is not a multiple of 4."""
    if len(packed) % 4:
        raise ValueError(f"packed token ids: {len(packed)} bytes is not a multiple of 4")
    return struct.unpack(f"<{len(packed) // 4}I", packed)


def chunk_id(tokenizer: TokenizerIdentity, type: ChunkType, token_ids: Sequence[int]) -> ChunkId:
    """The name of a chunk's content: ``H(tokenizer identity, type, token ids)``."""
    fields = (tokenizer.encode(), type.value.encode(), pack_token_ids(token_ids))
    return ChunkId(digest("cairn.chunk_id.v1", fields))


def chunk_key(model: ModelIdentity, context: Sequence[ChunkKey], token_ids: Sequence[int], salt: str = "") -> ChunkKey:
    """The name of a chunk's KV: ``H(model identity, [key(c) for c in context], token ids, salt)``.

    ``context`` holds the keys of the chunks that this chunk's tokens attend to, in order; ``salt`` keeps
    tenants apart (it enters every key of the context too, so one salted chunk salts what follows it).
    """
    fields = (
        model.encode(),
        "".join(context).encode(),
        pack_token_ids(token_ids),
        salt.encode(),
    )
    return ChunkKey(digest("cairn.chunk_key.v1", fields))
