from protos import chunks_pb2 as _chunks_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class PrefillChunkRequest(_message.Message):
    __slots__ = ("text", "token_ids", "chunk_id", "type", "context_chunk_ids", "reuse_mode", "name", "tags", "ttl_s", "pin", "role", "salt", "request_id", "shared")
    TEXT_FIELD_NUMBER: _ClassVar[int]
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    CHUNK_ID_FIELD_NUMBER: _ClassVar[int]
    TYPE_FIELD_NUMBER: _ClassVar[int]
    CONTEXT_CHUNK_IDS_FIELD_NUMBER: _ClassVar[int]
    REUSE_MODE_FIELD_NUMBER: _ClassVar[int]
    NAME_FIELD_NUMBER: _ClassVar[int]
    TAGS_FIELD_NUMBER: _ClassVar[int]
    TTL_S_FIELD_NUMBER: _ClassVar[int]
    PIN_FIELD_NUMBER: _ClassVar[int]
    ROLE_FIELD_NUMBER: _ClassVar[int]
    SALT_FIELD_NUMBER: _ClassVar[int]
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    SHARED_FIELD_NUMBER: _ClassVar[int]
    text: str
    token_ids: _chunks_pb2.TokenIds
    chunk_id: str
    type: _chunks_pb2.ChunkType
    context_chunk_ids: _containers.RepeatedScalarFieldContainer[str]
    reuse_mode: _chunks_pb2.ReuseMode
    name: str
    tags: _containers.RepeatedScalarFieldContainer[str]
    ttl_s: float
    pin: bool
    role: str
    salt: str
    request_id: str
    shared: bool
    def __init__(self, text: _Optional[str] = ..., token_ids: _Optional[_Union[_chunks_pb2.TokenIds, _Mapping]] = ..., chunk_id: _Optional[str] = ..., type: _Optional[_Union[_chunks_pb2.ChunkType, str]] = ..., context_chunk_ids: _Optional[_Iterable[str]] = ..., reuse_mode: _Optional[_Union[_chunks_pb2.ReuseMode, str]] = ..., name: _Optional[str] = ..., tags: _Optional[_Iterable[str]] = ..., ttl_s: _Optional[float] = ..., pin: _Optional[bool] = ..., role: _Optional[str] = ..., salt: _Optional[str] = ..., request_id: _Optional[str] = ..., shared: _Optional[bool] = ...) -> None: ...

class PrefillChunkResponse(_message.Message):
    __slots__ = ("chunk_id", "key", "outcome", "tokens", "computed_tokens", "reused_tokens", "timings", "model_identity", "newly_registered")
    class Outcome(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
        __slots__ = ()
        OUTCOME_UNSPECIFIED: _ClassVar[PrefillChunkResponse.Outcome]
        OUTCOME_COMPUTED: _ClassVar[PrefillChunkResponse.Outcome]
        OUTCOME_ALREADY_STORED: _ClassVar[PrefillChunkResponse.Outcome]
    OUTCOME_UNSPECIFIED: PrefillChunkResponse.Outcome
    OUTCOME_COMPUTED: PrefillChunkResponse.Outcome
    OUTCOME_ALREADY_STORED: PrefillChunkResponse.Outcome
    CHUNK_ID_FIELD_NUMBER: _ClassVar[int]
    KEY_FIELD_NUMBER: _ClassVar[int]
    OUTCOME_FIELD_NUMBER: _ClassVar[int]
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    COMPUTED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    REUSED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    TIMINGS_FIELD_NUMBER: _ClassVar[int]
    MODEL_IDENTITY_FIELD_NUMBER: _ClassVar[int]
    NEWLY_REGISTERED_FIELD_NUMBER: _ClassVar[int]
    chunk_id: str
    key: str
    outcome: PrefillChunkResponse.Outcome
    tokens: int
    computed_tokens: int
    reused_tokens: int
    timings: _chunks_pb2.StageTimings
    model_identity: str
    newly_registered: bool
    def __init__(self, chunk_id: _Optional[str] = ..., key: _Optional[str] = ..., outcome: _Optional[_Union[PrefillChunkResponse.Outcome, str]] = ..., tokens: _Optional[int] = ..., computed_tokens: _Optional[int] = ..., reused_tokens: _Optional[int] = ..., timings: _Optional[_Union[_chunks_pb2.StageTimings, _Mapping]] = ..., model_identity: _Optional[str] = ..., newly_registered: _Optional[bool] = ...) -> None: ...

class PrefillChunksResponse(_message.Message):
    __slots__ = ("response", "error")
    RESPONSE_FIELD_NUMBER: _ClassVar[int]
    ERROR_FIELD_NUMBER: _ClassVar[int]
    response: PrefillChunkResponse
    error: PrefillError
    def __init__(self, response: _Optional[_Union[PrefillChunkResponse, _Mapping]] = ..., error: _Optional[_Union[PrefillError, _Mapping]] = ...) -> None: ...

class PrefillError(_message.Message):
    __slots__ = ("code", "message")
    CODE_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    code: int
    message: str
    def __init__(self, code: _Optional[int] = ..., message: _Optional[str] = ...) -> None: ...

class GetChunkRequest(_message.Message):
    __slots__ = ("chunk_id", "include_token_ids", "include_text", "salt")
    CHUNK_ID_FIELD_NUMBER: _ClassVar[int]
    INCLUDE_TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    INCLUDE_TEXT_FIELD_NUMBER: _ClassVar[int]
    SALT_FIELD_NUMBER: _ClassVar[int]
    chunk_id: str
    include_token_ids: bool
    include_text: bool
    salt: str
    def __init__(self, chunk_id: _Optional[str] = ..., include_token_ids: _Optional[bool] = ..., include_text: _Optional[bool] = ..., salt: _Optional[str] = ...) -> None: ...

class ListChunksRequest(_message.Message):
    __slots__ = ("type", "tag", "name", "page_size", "page_token", "order", "salt")
    class Order(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
        __slots__ = ()
        ORDER_UNSPECIFIED: _ClassVar[ListChunksRequest.Order]
        ORDER_CREATED: _ClassVar[ListChunksRequest.Order]
        ORDER_LAST_USED: _ClassVar[ListChunksRequest.Order]
        ORDER_NAME: _ClassVar[ListChunksRequest.Order]
    ORDER_UNSPECIFIED: ListChunksRequest.Order
    ORDER_CREATED: ListChunksRequest.Order
    ORDER_LAST_USED: ListChunksRequest.Order
    ORDER_NAME: ListChunksRequest.Order
    TYPE_FIELD_NUMBER: _ClassVar[int]
    TAG_FIELD_NUMBER: _ClassVar[int]
    NAME_FIELD_NUMBER: _ClassVar[int]
    PAGE_SIZE_FIELD_NUMBER: _ClassVar[int]
    PAGE_TOKEN_FIELD_NUMBER: _ClassVar[int]
    ORDER_FIELD_NUMBER: _ClassVar[int]
    SALT_FIELD_NUMBER: _ClassVar[int]
    type: _chunks_pb2.ChunkType
    tag: str
    name: str
    page_size: int
    page_token: str
    order: ListChunksRequest.Order
    salt: str
    def __init__(self, type: _Optional[_Union[_chunks_pb2.ChunkType, str]] = ..., tag: _Optional[str] = ..., name: _Optional[str] = ..., page_size: _Optional[int] = ..., page_token: _Optional[str] = ..., order: _Optional[_Union[ListChunksRequest.Order, str]] = ..., salt: _Optional[str] = ...) -> None: ...

class ListChunksResponse(_message.Message):
    __slots__ = ("chunks", "next_page_token")
    CHUNKS_FIELD_NUMBER: _ClassVar[int]
    NEXT_PAGE_TOKEN_FIELD_NUMBER: _ClassVar[int]
    chunks: _containers.RepeatedCompositeFieldContainer[_chunks_pb2.Chunk]
    next_page_token: str
    def __init__(self, chunks: _Optional[_Iterable[_Union[_chunks_pb2.Chunk, _Mapping]]] = ..., next_page_token: _Optional[str] = ...) -> None: ...

class PinChunkRequest(_message.Message):
    __slots__ = ("chunk_id", "salt")
    CHUNK_ID_FIELD_NUMBER: _ClassVar[int]
    SALT_FIELD_NUMBER: _ClassVar[int]
    chunk_id: str
    salt: str
    def __init__(self, chunk_id: _Optional[str] = ..., salt: _Optional[str] = ...) -> None: ...

class UnpinChunkRequest(_message.Message):
    __slots__ = ("chunk_id", "salt")
    CHUNK_ID_FIELD_NUMBER: _ClassVar[int]
    SALT_FIELD_NUMBER: _ClassVar[int]
    chunk_id: str
    salt: str
    def __init__(self, chunk_id: _Optional[str] = ..., salt: _Optional[str] = ...) -> None: ...

class DeleteChunkRequest(_message.Message):
    __slots__ = ("chunk_id", "salt")
    CHUNK_ID_FIELD_NUMBER: _ClassVar[int]
    SALT_FIELD_NUMBER: _ClassVar[int]
    chunk_id: str
    salt: str
    def __init__(self, chunk_id: _Optional[str] = ..., salt: _Optional[str] = ...) -> None: ...

class DeleteChunkResponse(_message.Message):
    __slots__ = ("kv_entries", "kv_bytes")
    KV_ENTRIES_FIELD_NUMBER: _ClassVar[int]
    KV_BYTES_FIELD_NUMBER: _ClassVar[int]
    kv_entries: int
    kv_bytes: int
    def __init__(self, kv_entries: _Optional[int] = ..., kv_bytes: _Optional[int] = ...) -> None: ...

class StoreStatsRequest(_message.Message):
    __slots__ = ("salt",)
    SALT_FIELD_NUMBER: _ClassVar[int]
    salt: str
    def __init__(self, salt: _Optional[str] = ...) -> None: ...

class StoreStatsResponse(_message.Message):
    __slots__ = ("backend", "chunks", "chunks_max", "kv_entries", "kv_bytes", "capacity_bytes", "pinned_entries", "leased_entries", "evictions", "quarantined", "model_identity", "model_name", "whole_store")
    BACKEND_FIELD_NUMBER: _ClassVar[int]
    CHUNKS_FIELD_NUMBER: _ClassVar[int]
    CHUNKS_MAX_FIELD_NUMBER: _ClassVar[int]
    KV_ENTRIES_FIELD_NUMBER: _ClassVar[int]
    KV_BYTES_FIELD_NUMBER: _ClassVar[int]
    CAPACITY_BYTES_FIELD_NUMBER: _ClassVar[int]
    PINNED_ENTRIES_FIELD_NUMBER: _ClassVar[int]
    LEASED_ENTRIES_FIELD_NUMBER: _ClassVar[int]
    EVICTIONS_FIELD_NUMBER: _ClassVar[int]
    QUARANTINED_FIELD_NUMBER: _ClassVar[int]
    MODEL_IDENTITY_FIELD_NUMBER: _ClassVar[int]
    MODEL_NAME_FIELD_NUMBER: _ClassVar[int]
    WHOLE_STORE_FIELD_NUMBER: _ClassVar[int]
    backend: str
    chunks: int
    chunks_max: int
    kv_entries: int
    kv_bytes: int
    capacity_bytes: int
    pinned_entries: int
    leased_entries: int
    evictions: int
    quarantined: int
    model_identity: str
    model_name: str
    whole_store: bool
    def __init__(self, backend: _Optional[str] = ..., chunks: _Optional[int] = ..., chunks_max: _Optional[int] = ..., kv_entries: _Optional[int] = ..., kv_bytes: _Optional[int] = ..., capacity_bytes: _Optional[int] = ..., pinned_entries: _Optional[int] = ..., leased_entries: _Optional[int] = ..., evictions: _Optional[int] = ..., quarantined: _Optional[int] = ..., model_identity: _Optional[str] = ..., model_name: _Optional[str] = ..., whole_store: _Optional[bool] = ...) -> None: ...
