"""Between protobuf and the domain: enums, token ids and timings. Requests and replies are the services' own.

Both directions raise ``InvalidRequest`` for a number that this version does not know.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

from chunk_store.entry import MissReason
from chunk_store.key import ChunkType
from engine.reuse import Exactness, ReuseMode
from protos import chunks_pb2
from serving.errors import InvalidRequest
from serving.trace.stages import Stage

T = TypeVar("T")

_TYPES = {
    chunks_pb2.CHUNK_TYPE_SYSTEM_PROMPT: ChunkType.SYSTEM_PROMPT,
    chunks_pb2.CHUNK_TYPE_CONTEXT: ChunkType.CONTEXT,
    chunks_pb2.CHUNK_TYPE_CODE: ChunkType.CODE,
    chunks_pb2.CHUNK_TYPE_RAG_RESULT: ChunkType.RAG_RESULT,
    chunks_pb2.CHUNK_TYPE_QUERY: ChunkType.QUERY,
    chunks_pb2.CHUNK_TYPE_TURN: ChunkType.TURN,
}
_TYPES_OUT = {domain: number for number, domain in _TYPES.items()}

_MODES = {
    chunks_pb2.REUSE_MODE_EXACT: ReuseMode.EXACT,
    chunks_pb2.REUSE_MODE_ANCHORED: ReuseMode.ANCHORED,
    chunks_pb2.REUSE_MODE_INDEPENDENT: ReuseMode.INDEPENDENT,
}
_MODES_OUT = {domain: number for number, domain in _MODES.items()}

_EXACTNESS_OUT = {
    Exactness.EXACT_CONTEXT: chunks_pb2.EXACTNESS_EXACT_CONTEXT,
    Exactness.EXACT_BLOCK_MASK: chunks_pb2.EXACTNESS_EXACT_BLOCK_MASK,
}

_REASONS_OUT = {
    MissReason.NOT_STORED: chunks_pb2.MISS_REASON_NOT_STORED,
    MissReason.CONTEXT_DIFFERS: chunks_pb2.MISS_REASON_CONTEXT_DIFFERS,
    MissReason.EVICTED: chunks_pb2.MISS_REASON_EVICTED,
    MissReason.LOAD_FAILED: chunks_pb2.MISS_REASON_LOAD_FAILED,
    MissReason.VERIFY_FAILED: chunks_pb2.MISS_REASON_VERIFY_FAILED,
    MissReason.FORMAT_DIFFERS: chunks_pb2.MISS_REASON_FORMAT_DIFFERS,
}


def chunk_type(number: int, *, unspecified: ChunkType = ChunkType.CONTEXT) -> ChunkType:
    """The chunk type a message means; ``unspecified`` where it does not say."""
    if number == chunks_pb2.CHUNK_TYPE_UNSPECIFIED:
        return unspecified
    return _known(_TYPES, number, "type")


def chunk_type_out(type: ChunkType) -> chunks_pb2.ChunkType.ValueType:
    return _TYPES_OUT[type]


def reuse_mode(number: int) -> ReuseMode:
    """The reuse mode a message means; EXACT where it does not say."""
    if number == chunks_pb2.REUSE_MODE_UNSPECIFIED:
        return ReuseMode.EXACT
    return _known(_MODES, number, "reuse_mode")


def reuse_mode_out(mode: ReuseMode) -> chunks_pb2.ReuseMode.ValueType:
    return _MODES_OUT[mode]


def exactness_out(exactness: Exactness) -> chunks_pb2.Exactness.ValueType:
    return _EXACTNESS_OUT[exactness]


def miss_reason_out(reason: MissReason | None) -> chunks_pb2.MissReason.ValueType:
    """UNSPECIFIED for None: no miss."""
    return chunks_pb2.MISS_REASON_UNSPECIFIED if reason is None else _REASONS_OUT[reason]


def timings_out(spent_ns: Mapping[Stage, int]) -> chunks_pb2.StageTimings:
    """Nanoseconds by stage as the message."""
    return chunks_pb2.StageTimings(**{f"{stage}_ns": value for stage, value in spent_ns.items()})


def _known(table: Mapping[Any, T], number: int, field: str) -> T:
    try:
        return table[number]
    except KeyError:
        raise InvalidRequest(
            f"{number} is unknown to this server", field=field, remedy=f"use one of {sorted(table)}"
        ) from None
