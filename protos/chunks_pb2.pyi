from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class ChunkType(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    CHUNK_TYPE_UNSPECIFIED: _ClassVar[ChunkType]
    CHUNK_TYPE_SYSTEM_PROMPT: _ClassVar[ChunkType]
    CHUNK_TYPE_CONTEXT: _ClassVar[ChunkType]
    CHUNK_TYPE_CODE: _ClassVar[ChunkType]
    CHUNK_TYPE_RAG_RESULT: _ClassVar[ChunkType]
    CHUNK_TYPE_QUERY: _ClassVar[ChunkType]

class ReuseMode(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    REUSE_MODE_UNSPECIFIED: _ClassVar[ReuseMode]
    REUSE_MODE_EXACT: _ClassVar[ReuseMode]
    REUSE_MODE_ANCHORED: _ClassVar[ReuseMode]
    REUSE_MODE_INDEPENDENT: _ClassVar[ReuseMode]

class Exactness(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    EXACTNESS_UNSPECIFIED: _ClassVar[Exactness]
    EXACTNESS_EXACT_CONTEXT: _ClassVar[Exactness]
    EXACTNESS_EXACT_BLOCK_MASK: _ClassVar[Exactness]
    EXACTNESS_APPROXIMATE: _ClassVar[Exactness]

class MissReason(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    MISS_REASON_UNSPECIFIED: _ClassVar[MissReason]
    MISS_REASON_NOT_STORED: _ClassVar[MissReason]
    MISS_REASON_CONTEXT_DIFFERS: _ClassVar[MissReason]
    MISS_REASON_EVICTED: _ClassVar[MissReason]
    MISS_REASON_LOAD_FAILED: _ClassVar[MissReason]
    MISS_REASON_VERIFY_FAILED: _ClassVar[MissReason]
    MISS_REASON_FORMAT_DIFFERS: _ClassVar[MissReason]
CHUNK_TYPE_UNSPECIFIED: ChunkType
CHUNK_TYPE_SYSTEM_PROMPT: ChunkType
CHUNK_TYPE_CONTEXT: ChunkType
CHUNK_TYPE_CODE: ChunkType
CHUNK_TYPE_RAG_RESULT: ChunkType
CHUNK_TYPE_QUERY: ChunkType
REUSE_MODE_UNSPECIFIED: ReuseMode
REUSE_MODE_EXACT: ReuseMode
REUSE_MODE_ANCHORED: ReuseMode
REUSE_MODE_INDEPENDENT: ReuseMode
EXACTNESS_UNSPECIFIED: Exactness
EXACTNESS_EXACT_CONTEXT: Exactness
EXACTNESS_EXACT_BLOCK_MASK: Exactness
EXACTNESS_APPROXIMATE: Exactness
MISS_REASON_UNSPECIFIED: MissReason
MISS_REASON_NOT_STORED: MissReason
MISS_REASON_CONTEXT_DIFFERS: MissReason
MISS_REASON_EVICTED: MissReason
MISS_REASON_LOAD_FAILED: MissReason
MISS_REASON_VERIFY_FAILED: MissReason
MISS_REASON_FORMAT_DIFFERS: MissReason

class TokenIds(_message.Message):
    __slots__ = ("ids",)
    IDS_FIELD_NUMBER: _ClassVar[int]
    ids: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, ids: _Optional[_Iterable[int]] = ...) -> None: ...

class Chunk(_message.Message):
    __slots__ = ("chunk_id", "type", "name", "tags", "tokens", "pinned", "created_unix_s", "last_used_unix_s", "expires_unix_s", "kv_entries", "kv_bytes", "token_ids", "text", "shared")
    CHUNK_ID_FIELD_NUMBER: _ClassVar[int]
    TYPE_FIELD_NUMBER: _ClassVar[int]
    NAME_FIELD_NUMBER: _ClassVar[int]
    TAGS_FIELD_NUMBER: _ClassVar[int]
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    PINNED_FIELD_NUMBER: _ClassVar[int]
    CREATED_UNIX_S_FIELD_NUMBER: _ClassVar[int]
    LAST_USED_UNIX_S_FIELD_NUMBER: _ClassVar[int]
    EXPIRES_UNIX_S_FIELD_NUMBER: _ClassVar[int]
    KV_ENTRIES_FIELD_NUMBER: _ClassVar[int]
    KV_BYTES_FIELD_NUMBER: _ClassVar[int]
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    TEXT_FIELD_NUMBER: _ClassVar[int]
    SHARED_FIELD_NUMBER: _ClassVar[int]
    chunk_id: str
    type: ChunkType
    name: str
    tags: _containers.RepeatedScalarFieldContainer[str]
    tokens: int
    pinned: bool
    created_unix_s: float
    last_used_unix_s: float
    expires_unix_s: float
    kv_entries: int
    kv_bytes: int
    token_ids: _containers.RepeatedScalarFieldContainer[int]
    text: str
    shared: bool
    def __init__(self, chunk_id: _Optional[str] = ..., type: _Optional[_Union[ChunkType, str]] = ..., name: _Optional[str] = ..., tags: _Optional[_Iterable[str]] = ..., tokens: _Optional[int] = ..., pinned: _Optional[bool] = ..., created_unix_s: _Optional[float] = ..., last_used_unix_s: _Optional[float] = ..., expires_unix_s: _Optional[float] = ..., kv_entries: _Optional[int] = ..., kv_bytes: _Optional[int] = ..., token_ids: _Optional[_Iterable[int]] = ..., text: _Optional[str] = ..., shared: _Optional[bool] = ...) -> None: ...

class StageTimings(_message.Message):
    __slots__ = ("queue_ns", "tokenize_ns", "lookup_ns", "prefill_ns", "publish_ns", "load_ns", "forward_ns", "first_token_ns", "decode_ns", "total_ns")
    QUEUE_NS_FIELD_NUMBER: _ClassVar[int]
    TOKENIZE_NS_FIELD_NUMBER: _ClassVar[int]
    LOOKUP_NS_FIELD_NUMBER: _ClassVar[int]
    PREFILL_NS_FIELD_NUMBER: _ClassVar[int]
    PUBLISH_NS_FIELD_NUMBER: _ClassVar[int]
    LOAD_NS_FIELD_NUMBER: _ClassVar[int]
    FORWARD_NS_FIELD_NUMBER: _ClassVar[int]
    FIRST_TOKEN_NS_FIELD_NUMBER: _ClassVar[int]
    DECODE_NS_FIELD_NUMBER: _ClassVar[int]
    TOTAL_NS_FIELD_NUMBER: _ClassVar[int]
    queue_ns: int
    tokenize_ns: int
    lookup_ns: int
    prefill_ns: int
    publish_ns: int
    load_ns: int
    forward_ns: int
    first_token_ns: int
    decode_ns: int
    total_ns: int
    def __init__(self, queue_ns: _Optional[int] = ..., tokenize_ns: _Optional[int] = ..., lookup_ns: _Optional[int] = ..., prefill_ns: _Optional[int] = ..., publish_ns: _Optional[int] = ..., load_ns: _Optional[int] = ..., forward_ns: _Optional[int] = ..., first_token_ns: _Optional[int] = ..., decode_ns: _Optional[int] = ..., total_ns: _Optional[int] = ...) -> None: ...
