from protos import chunks_pb2 as _chunks_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class CacheUse(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    CACHE_USE_UNSPECIFIED: _ClassVar[CacheUse]
    CACHE_USE_SHARED: _ClassVar[CacheUse]
    CACHE_USE_BYPASS: _ClassVar[CacheUse]

class KvSource(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    KV_SOURCE_UNSPECIFIED: _ClassVar[KvSource]
    KV_SOURCE_DEVICE: _ClassVar[KvSource]
    KV_SOURCE_HOST: _ClassVar[KvSource]
    KV_SOURCE_STORE: _ClassVar[KvSource]
    KV_SOURCE_COMPUTED: _ClassVar[KvSource]

class Unpublished(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    UNPUBLISHED_UNSPECIFIED: _ClassVar[Unpublished]
    UNPUBLISHED_STORE_FULL: _ClassVar[Unpublished]
    UNPUBLISHED_STORE_UNAVAILABLE: _ClassVar[Unpublished]
CACHE_USE_UNSPECIFIED: CacheUse
CACHE_USE_SHARED: CacheUse
CACHE_USE_BYPASS: CacheUse
KV_SOURCE_UNSPECIFIED: KvSource
KV_SOURCE_DEVICE: KvSource
KV_SOURCE_HOST: KvSource
KV_SOURCE_STORE: KvSource
KV_SOURCE_COMPUTED: KvSource
UNPUBLISHED_UNSPECIFIED: Unpublished
UNPUBLISHED_STORE_FULL: Unpublished
UNPUBLISHED_STORE_UNAVAILABLE: Unpublished

class Segment(_message.Message):
    __slots__ = ("chunk_id", "text", "token_ids", "type", "role")
    CHUNK_ID_FIELD_NUMBER: _ClassVar[int]
    TEXT_FIELD_NUMBER: _ClassVar[int]
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    TYPE_FIELD_NUMBER: _ClassVar[int]
    ROLE_FIELD_NUMBER: _ClassVar[int]
    chunk_id: str
    text: str
    token_ids: _chunks_pb2.TokenIds
    type: _chunks_pb2.ChunkType
    role: str
    def __init__(self, chunk_id: _Optional[str] = ..., text: _Optional[str] = ..., token_ids: _Optional[_Union[_chunks_pb2.TokenIds, _Mapping]] = ..., type: _Optional[_Union[_chunks_pb2.ChunkType, str]] = ..., role: _Optional[str] = ...) -> None: ...

class SamplingParams(_message.Message):
    __slots__ = ("temperature", "top_p", "top_k", "min_p", "frequency_penalty", "presence_penalty", "repetition_penalty", "max_tokens", "min_tokens", "stop", "stop_token_ids", "ignore_eos", "seed", "logprobs", "keep_special_tokens")
    TEMPERATURE_FIELD_NUMBER: _ClassVar[int]
    TOP_P_FIELD_NUMBER: _ClassVar[int]
    TOP_K_FIELD_NUMBER: _ClassVar[int]
    MIN_P_FIELD_NUMBER: _ClassVar[int]
    FREQUENCY_PENALTY_FIELD_NUMBER: _ClassVar[int]
    PRESENCE_PENALTY_FIELD_NUMBER: _ClassVar[int]
    REPETITION_PENALTY_FIELD_NUMBER: _ClassVar[int]
    MAX_TOKENS_FIELD_NUMBER: _ClassVar[int]
    MIN_TOKENS_FIELD_NUMBER: _ClassVar[int]
    STOP_FIELD_NUMBER: _ClassVar[int]
    STOP_TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    IGNORE_EOS_FIELD_NUMBER: _ClassVar[int]
    SEED_FIELD_NUMBER: _ClassVar[int]
    LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    KEEP_SPECIAL_TOKENS_FIELD_NUMBER: _ClassVar[int]
    temperature: float
    top_p: float
    top_k: int
    min_p: float
    frequency_penalty: float
    presence_penalty: float
    repetition_penalty: float
    max_tokens: int
    min_tokens: int
    stop: _containers.RepeatedScalarFieldContainer[str]
    stop_token_ids: _containers.RepeatedScalarFieldContainer[int]
    ignore_eos: bool
    seed: int
    logprobs: bool
    keep_special_tokens: bool
    def __init__(self, temperature: _Optional[float] = ..., top_p: _Optional[float] = ..., top_k: _Optional[int] = ..., min_p: _Optional[float] = ..., frequency_penalty: _Optional[float] = ..., presence_penalty: _Optional[float] = ..., repetition_penalty: _Optional[float] = ..., max_tokens: _Optional[int] = ..., min_tokens: _Optional[int] = ..., stop: _Optional[_Iterable[str]] = ..., stop_token_ids: _Optional[_Iterable[int]] = ..., ignore_eos: _Optional[bool] = ..., seed: _Optional[int] = ..., logprobs: _Optional[bool] = ..., keep_special_tokens: _Optional[bool] = ...) -> None: ...

class GenerateRequest(_message.Message):
    __slots__ = ("request_id", "segments", "sampling", "reuse_mode", "salt", "cache_use")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    SEGMENTS_FIELD_NUMBER: _ClassVar[int]
    SAMPLING_FIELD_NUMBER: _ClassVar[int]
    REUSE_MODE_FIELD_NUMBER: _ClassVar[int]
    SALT_FIELD_NUMBER: _ClassVar[int]
    CACHE_USE_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    segments: _containers.RepeatedCompositeFieldContainer[Segment]
    sampling: SamplingParams
    reuse_mode: _chunks_pb2.ReuseMode
    salt: str
    cache_use: CacheUse
    def __init__(self, request_id: _Optional[str] = ..., segments: _Optional[_Iterable[_Union[Segment, _Mapping]]] = ..., sampling: _Optional[_Union[SamplingParams, _Mapping]] = ..., reuse_mode: _Optional[_Union[_chunks_pb2.ReuseMode, str]] = ..., salt: _Optional[str] = ..., cache_use: _Optional[_Union[CacheUse, str]] = ...) -> None: ...

class GenerateResponse(_message.Message):
    __slots__ = ("delta", "complete")
    DELTA_FIELD_NUMBER: _ClassVar[int]
    COMPLETE_FIELD_NUMBER: _ClassVar[int]
    delta: Delta
    complete: Complete
    def __init__(self, delta: _Optional[_Union[Delta, _Mapping]] = ..., complete: _Optional[_Union[Complete, _Mapping]] = ...) -> None: ...

class Delta(_message.Message):
    __slots__ = ("text", "token_ids", "logprobs")
    TEXT_FIELD_NUMBER: _ClassVar[int]
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    text: str
    token_ids: _containers.RepeatedScalarFieldContainer[int]
    logprobs: _containers.RepeatedScalarFieldContainer[float]
    def __init__(self, text: _Optional[str] = ..., token_ids: _Optional[_Iterable[int]] = ..., logprobs: _Optional[_Iterable[float]] = ...) -> None: ...

class Usage(_message.Message):
    __slots__ = ("prompt_tokens", "cached_tokens", "computed_tokens", "completion_tokens")
    PROMPT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    CACHED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    COMPUTED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    COMPLETION_TOKENS_FIELD_NUMBER: _ClassVar[int]
    prompt_tokens: int
    cached_tokens: int
    computed_tokens: int
    completion_tokens: int
    def __init__(self, prompt_tokens: _Optional[int] = ..., cached_tokens: _Optional[int] = ..., computed_tokens: _Optional[int] = ..., completion_tokens: _Optional[int] = ...) -> None: ...

class SegmentReport(_message.Message):
    __slots__ = ("chunk_id", "name", "type", "tokens", "cached_tokens", "source", "level", "offset", "exactness", "miss_reason", "unpublished")
    CHUNK_ID_FIELD_NUMBER: _ClassVar[int]
    NAME_FIELD_NUMBER: _ClassVar[int]
    TYPE_FIELD_NUMBER: _ClassVar[int]
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    CACHED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    SOURCE_FIELD_NUMBER: _ClassVar[int]
    LEVEL_FIELD_NUMBER: _ClassVar[int]
    OFFSET_FIELD_NUMBER: _ClassVar[int]
    EXACTNESS_FIELD_NUMBER: _ClassVar[int]
    MISS_REASON_FIELD_NUMBER: _ClassVar[int]
    UNPUBLISHED_FIELD_NUMBER: _ClassVar[int]
    chunk_id: str
    name: str
    type: _chunks_pb2.ChunkType
    tokens: int
    cached_tokens: int
    source: KvSource
    level: int
    offset: int
    exactness: _chunks_pb2.Exactness
    miss_reason: _chunks_pb2.MissReason
    unpublished: Unpublished
    def __init__(self, chunk_id: _Optional[str] = ..., name: _Optional[str] = ..., type: _Optional[_Union[_chunks_pb2.ChunkType, str]] = ..., tokens: _Optional[int] = ..., cached_tokens: _Optional[int] = ..., source: _Optional[_Union[KvSource, str]] = ..., level: _Optional[int] = ..., offset: _Optional[int] = ..., exactness: _Optional[_Union[_chunks_pb2.Exactness, str]] = ..., miss_reason: _Optional[_Union[_chunks_pb2.MissReason, str]] = ..., unpublished: _Optional[_Union[Unpublished, str]] = ...) -> None: ...

class ReuseReport(_message.Message):
    __slots__ = ("reuse_mode", "exactness", "segments")
    REUSE_MODE_FIELD_NUMBER: _ClassVar[int]
    EXACTNESS_FIELD_NUMBER: _ClassVar[int]
    SEGMENTS_FIELD_NUMBER: _ClassVar[int]
    reuse_mode: _chunks_pb2.ReuseMode
    exactness: _chunks_pb2.Exactness
    segments: _containers.RepeatedCompositeFieldContainer[SegmentReport]
    def __init__(self, reuse_mode: _Optional[_Union[_chunks_pb2.ReuseMode, str]] = ..., exactness: _Optional[_Union[_chunks_pb2.Exactness, str]] = ..., segments: _Optional[_Iterable[_Union[SegmentReport, _Mapping]]] = ...) -> None: ...

class Complete(_message.Message):
    __slots__ = ("request_id", "finish_reason", "usage", "reuse", "timings", "seed", "model_name")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    FINISH_REASON_FIELD_NUMBER: _ClassVar[int]
    USAGE_FIELD_NUMBER: _ClassVar[int]
    REUSE_FIELD_NUMBER: _ClassVar[int]
    TIMINGS_FIELD_NUMBER: _ClassVar[int]
    SEED_FIELD_NUMBER: _ClassVar[int]
    MODEL_NAME_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    finish_reason: str
    usage: Usage
    reuse: ReuseReport
    timings: _chunks_pb2.StageTimings
    seed: int
    model_name: str
    def __init__(self, request_id: _Optional[str] = ..., finish_reason: _Optional[str] = ..., usage: _Optional[_Union[Usage, _Mapping]] = ..., reuse: _Optional[_Union[ReuseReport, _Mapping]] = ..., timings: _Optional[_Union[_chunks_pb2.StageTimings, _Mapping]] = ..., seed: _Optional[int] = ..., model_name: _Optional[str] = ...) -> None: ...

class ExplainResponse(_message.Message):
    __slots__ = ("prompt_tokens", "cached_tokens", "computed_tokens", "reuse", "bytes_to_load", "bytes_to_compute", "bytes_read_per_step", "bytes_shared_per_step")
    PROMPT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    CACHED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    COMPUTED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    REUSE_FIELD_NUMBER: _ClassVar[int]
    BYTES_TO_LOAD_FIELD_NUMBER: _ClassVar[int]
    BYTES_TO_COMPUTE_FIELD_NUMBER: _ClassVar[int]
    BYTES_READ_PER_STEP_FIELD_NUMBER: _ClassVar[int]
    BYTES_SHARED_PER_STEP_FIELD_NUMBER: _ClassVar[int]
    prompt_tokens: int
    cached_tokens: int
    computed_tokens: int
    reuse: ReuseReport
    bytes_to_load: int
    bytes_to_compute: int
    bytes_read_per_step: int
    bytes_shared_per_step: int
    def __init__(self, prompt_tokens: _Optional[int] = ..., cached_tokens: _Optional[int] = ..., computed_tokens: _Optional[int] = ..., reuse: _Optional[_Union[ReuseReport, _Mapping]] = ..., bytes_to_load: _Optional[int] = ..., bytes_to_compute: _Optional[int] = ..., bytes_read_per_step: _Optional[int] = ..., bytes_shared_per_step: _Optional[int] = ...) -> None: ...

class AbortRequest(_message.Message):
    __slots__ = ("request_id",)
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    def __init__(self, request_id: _Optional[str] = ...) -> None: ...

class AbortResponse(_message.Message):
    __slots__ = ("found",)
    FOUND_FIELD_NUMBER: _ClassVar[int]
    found: bool
    def __init__(self, found: _Optional[bool] = ...) -> None: ...

class GetLoadsRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class GetLoadsResponse(_message.Message):
    __slots__ = ("running", "waiting", "waiting_max", "batch_max", "pages_total", "pages_free", "pages_chunks", "pages_tails", "chunks_resident", "page_size", "model_name", "model_identity", "context_length_max", "modes", "dtype", "dtype_reason", "context_length_declared", "context_length_reason")
    RUNNING_FIELD_NUMBER: _ClassVar[int]
    WAITING_FIELD_NUMBER: _ClassVar[int]
    WAITING_MAX_FIELD_NUMBER: _ClassVar[int]
    BATCH_MAX_FIELD_NUMBER: _ClassVar[int]
    PAGES_TOTAL_FIELD_NUMBER: _ClassVar[int]
    PAGES_FREE_FIELD_NUMBER: _ClassVar[int]
    PAGES_CHUNKS_FIELD_NUMBER: _ClassVar[int]
    PAGES_TAILS_FIELD_NUMBER: _ClassVar[int]
    CHUNKS_RESIDENT_FIELD_NUMBER: _ClassVar[int]
    PAGE_SIZE_FIELD_NUMBER: _ClassVar[int]
    MODEL_NAME_FIELD_NUMBER: _ClassVar[int]
    MODEL_IDENTITY_FIELD_NUMBER: _ClassVar[int]
    CONTEXT_LENGTH_MAX_FIELD_NUMBER: _ClassVar[int]
    MODES_FIELD_NUMBER: _ClassVar[int]
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    DTYPE_REASON_FIELD_NUMBER: _ClassVar[int]
    CONTEXT_LENGTH_DECLARED_FIELD_NUMBER: _ClassVar[int]
    CONTEXT_LENGTH_REASON_FIELD_NUMBER: _ClassVar[int]
    running: int
    waiting: int
    waiting_max: int
    batch_max: int
    pages_total: int
    pages_free: int
    pages_chunks: int
    pages_tails: int
    chunks_resident: int
    page_size: int
    model_name: str
    model_identity: str
    context_length_max: int
    modes: _containers.RepeatedCompositeFieldContainer[ModeSupport]
    dtype: str
    dtype_reason: str
    context_length_declared: int
    context_length_reason: str
    def __init__(self, running: _Optional[int] = ..., waiting: _Optional[int] = ..., waiting_max: _Optional[int] = ..., batch_max: _Optional[int] = ..., pages_total: _Optional[int] = ..., pages_free: _Optional[int] = ..., pages_chunks: _Optional[int] = ..., pages_tails: _Optional[int] = ..., chunks_resident: _Optional[int] = ..., page_size: _Optional[int] = ..., model_name: _Optional[str] = ..., model_identity: _Optional[str] = ..., context_length_max: _Optional[int] = ..., modes: _Optional[_Iterable[_Union[ModeSupport, _Mapping]]] = ..., dtype: _Optional[str] = ..., dtype_reason: _Optional[str] = ..., context_length_declared: _Optional[int] = ..., context_length_reason: _Optional[str] = ...) -> None: ...

class ModeSupport(_message.Message):
    __slots__ = ("mode", "supported", "reason", "context_length_max")
    MODE_FIELD_NUMBER: _ClassVar[int]
    SUPPORTED_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    CONTEXT_LENGTH_MAX_FIELD_NUMBER: _ClassVar[int]
    mode: _chunks_pb2.ReuseMode
    supported: bool
    reason: str
    context_length_max: int
    def __init__(self, mode: _Optional[_Union[_chunks_pb2.ReuseMode, str]] = ..., supported: _Optional[bool] = ..., reason: _Optional[str] = ..., context_length_max: _Optional[int] = ...) -> None: ...
