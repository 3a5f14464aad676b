"""Between the protobuf messages of ``decode.proto`` and the decode service's own values."""

from __future__ import annotations

import random
from collections.abc import Sequence as Items

from chunk_store.key import ChunkType
from decode_service.prompt.composition import Composition
from decode_service.prompt.order import ChunkOrder
from decode_service.prompt.request_chunk import ChunkOutcome, Segment, Unpublished
from decode_service.prompt.resolver import SegmentRequest
from decode_service.scheduling.kept import Kept, KeptKV, NotKept
from decode_service.scheduling.sequence import Sequence
from engine.kv.source import KVSource
from engine.reuse import Exactness, ReuseMode
from engine.sampling.params import SEED_MAX, SamplingParams
from protos import chunks_pb2, decode_pb2
from serving.errors import InvalidRequest
from serving.rpc import wire
from serving.rpc.field_bounds import ContentBudget, check_count, check_id, check_label

MAX_TOKENS_DEFAULT = 128
PRIORITY_MAX = 9
START_WITHIN_S_MAX = 86400.0
SEED_BITS = 62
SEGMENTS_MAX = 1024
STOPS_MAX = 16
STOP_TOKEN_IDS_MAX = 4096
ANSWERS_MAX = 16

_SOURCES = {
    KVSource.DEVICE: decode_pb2.KV_SOURCE_DEVICE,
    KVSource.HOST: decode_pb2.KV_SOURCE_HOST,
    KVSource.STORE: decode_pb2.KV_SOURCE_STORE,
    KVSource.COMPUTED: decode_pb2.KV_SOURCE_COMPUTED,
}

_ORDERS = {
    decode_pb2.CHUNK_ORDER_UNSPECIFIED: ChunkOrder.GIVEN,
    decode_pb2.CHUNK_ORDER_GIVEN: ChunkOrder.GIVEN,
    decode_pb2.CHUNK_ORDER_CANONICAL: ChunkOrder.CANONICAL,
}
_ORDERS_OUT = {order: number for number, order in _ORDERS.items()}

_UNPUBLISHED = {
    None: chunks_pb2.UNPUBLISHED_UNSPECIFIED,
    Unpublished.STORE_FULL: chunks_pb2.UNPUBLISHED_STORE_FULL,
    Unpublished.STORE_UNAVAILABLE: chunks_pb2.UNPUBLISHED_STORE_UNAVAILABLE,
}

_KEPT_KV = {
    KeptKV.RESIDENT: decode_pb2.KEPT_KV_RESIDENT,
    KeptKV.COMPUTING: decode_pb2.KEPT_KV_COMPUTING,
    KeptKV.NONE: decode_pb2.KEPT_KV_NONE,
}

_NOT_KEPT = {
    None: decode_pb2.NOT_KEPT_UNSPECIFIED,
    NotKept.POOL_FULL: decode_pb2.NOT_KEPT_POOL_FULL,
    NotKept.QUEUE_FULL: decode_pb2.NOT_KEPT_QUEUE_FULL,
    NotKept.STORE_FULL: decode_pb2.NOT_KEPT_STORE_FULL,
    NotKept.STORE_UNAVAILABLE: decode_pb2.NOT_KEPT_STORE_UNAVAILABLE,
}


def segments_in(segments: Items[decode_pb2.Segment], budget: ContentBudget) -> list[SegmentRequest]:
    """Segments as plain values, within ``budget``. Raises ``RequestError`` naming the one that is not acceptable."""
    check_count("segments", segments, SEGMENTS_MAX, "join some")
    return [_segment_in(index, segment, budget, len(segments)) for index, segment in enumerate(segments)]


def _segment_in(index: int, segment: decode_pb2.Segment, budget: ContentBudget, count: int) -> SegmentRequest:
    content, field = segment.WhichOneof("content"), f"segments[{index}]"
    if content is None:
        raise InvalidRequest("give one of chunk_id, text and token_ids", field=field)
    check_label(f"{field}.role", segment.role)
    text = token_ids = name = None
    if content == "text":
        text = segment.text
        budget.take_text(f"{field}.text", text)
    elif content == "token_ids":
        budget.take_tokens(f"{field}.token_ids", segment.token_ids.ids)
        token_ids = tuple(segment.token_ids.ids)
    else:
        name = segment.chunk_id
        check_id(f"{field}.chunk_id", name)
    unspecified = ChunkType.QUERY if index == count - 1 else ChunkType.CONTEXT
    return SegmentRequest(text, token_ids, name, wire.chunk_type(segment.type, unspecified=unspecified), segment.role)


def order_in(number: int) -> ChunkOrder:
    """The order a request asks for. Raises ``InvalidRequest`` for one that this version does not know."""
    try:
        return _ORDERS[decode_pb2.ChunkOrder.ValueType(number)]
    except KeyError:
        raise InvalidRequest(f"{number} is not known to this version", field="order") from None


def check_sampling(sampling: decode_pb2.SamplingParams) -> None:
    """Counts and lengths. Raises ``RequestError`` naming the field, without what stands in it."""
    check_count("sampling.stop_token_ids", sampling.stop_token_ids, STOP_TOKEN_IDS_MAX)
    check_count("sampling.stop", sampling.stop, STOPS_MAX)
    for index, text in enumerate(sampling.stop):
        check_label(f"sampling.stop[{index}]", text)
        if not text:
            raise InvalidRequest("is empty", field=f"sampling.stop[{index}]", remedy="leave it out")


def check_turn(request: decode_pb2.GenerateRequest) -> None:
    """When a request wants its turn. Raises ``InvalidRequest`` naming the field."""
    if request.priority > PRIORITY_MAX:
        raise InvalidRequest(f"{request.priority} must be in 0..{PRIORITY_MAX}", field="priority")
    if not 0.0 <= request.start_within_s <= START_WITHIN_S_MAX:  # nor for NaN
        raise InvalidRequest(
            f"{request.start_within_s!r} must be in 0..{START_WITHIN_S_MAX:g} seconds, 0 for no limit",
            field="start_within_s",
        )


def computes_anew(request: decode_pb2.GenerateRequest) -> bool:
    """Whether a request computes its whole prompt itself, and leaves nothing of it."""
    return request.cache_use == decode_pb2.CACHE_USE_BYPASS or request.sampling.HasField("prompt_logprobs")


def check_keep(request: decode_pb2.GenerateRequest) -> None:
    """Raises ``InvalidRequest`` for a request whose turn cannot be kept as what a later one would look for."""
    if request.keep and computes_anew(request):
        raise InvalidRequest(
            "nothing of a request is kept that bypasses the caches, as one with prompt_logprobs does", field="keep"
        )
    if request.keep and wire.reuse_mode(request.reuse_mode) is not ReuseMode.EXACT:
        raise InvalidRequest(
            "an answer attends to all that stands before it, so its KV is that of a chunk in reuse mode exact only",
            field="keep",
            remedy="use exact, or send the turn as chunks of your own",
        )


def kept_out(kept: Kept) -> decode_pb2.Kept:
    return decode_pb2.Kept(
        chunk_id=kept.chunk_id,
        registered=kept.registered,
        kv=_KEPT_KV[kept.kv],
        reason=_NOT_KEPT[kept.why],
        query_token_ids=kept.query,
    )


def answers_in(sampling: decode_pb2.SamplingParams) -> int:
    """How many answers are asked for. Raises ``InvalidRequest`` for more than there may be, and seeds that run out."""
    if sampling.n > ANSWERS_MAX:
        raise InvalidRequest(f"{sampling.n} must be at most {ANSWERS_MAX}", field="sampling.n")
    if sampling.HasField("seed") and sampling.seed <= SEED_MAX < sampling.seed + max(1, sampling.n) - 1:
        raise InvalidRequest(
            f"answer {sampling.n - 1} would draw with a seed beyond {SEED_MAX}",
            field="sampling.seed",
            remedy="use a smaller one, or fewer answers",
        )
    return max(1, sampling.n)


def max_tokens_in(sampling: decode_pb2.SamplingParams) -> int | None:
    """The limit asked for; None if unset."""
    return sampling.max_tokens if sampling.HasField("max_tokens") else None


def sampling_in(
    sampling: decode_pb2.SamplingParams, max_tokens: int, vocabulary: int, eos_token_ids: frozenset[int]
) -> SamplingParams:
    """Sampling parameters with the field's defaults. Raises ``RequestError`` naming the field."""
    for name, tokens in (("stop_token_ids", sampling.stop_token_ids), ("logit_bias", sampling.logit_bias)):
        outside = max(tokens, default=0)
        if outside >= vocabulary:
            raise InvalidRequest(
                f"{outside} is outside the model's vocabulary of {vocabulary}", field=f"sampling.{name}"
            )
    try:
        params = SamplingParams(
            temperature=sampling.temperature,
            top_p=sampling.top_p if sampling.HasField("top_p") else 1.0,
            top_k=sampling.top_k,
            min_p=sampling.min_p,
            frequency_penalty=sampling.frequency_penalty,
            presence_penalty=sampling.presence_penalty,
            repetition_penalty=sampling.repetition_penalty if sampling.HasField("repetition_penalty") else 1.0,
            max_tokens=max_tokens,
            min_tokens=sampling.min_tokens,
            stop=tuple(sampling.stop),
            stop_token_ids=frozenset(sampling.stop_token_ids),
            ignore_eos=sampling.ignore_eos,
            seed=sampling.seed if sampling.HasField("seed") else random.getrandbits(SEED_BITS),
            logprobs=sampling.logprobs,
            top_logprobs=sampling.top_logprobs,
            logit_bias=tuple(sorted(sampling.logit_bias.items())),
        )
    except ValueError as error:
        raise InvalidRequest(str(error)) from error
    if params.min_tokens and params.stops_at(eos_token_ids).issuperset(range(vocabulary)):
        raise InvalidRequest(
            f"{params.min_tokens} cannot be reached: all {vocabulary} tokens end the answer",
            field="sampling.min_tokens",
            remedy="name fewer stop_token_ids",
        )
    return params


def usage_out(sequence: Sequence, completion_tokens: int) -> decode_pb2.Usage:
    """Tokens by what was done for them; cached + computed = prompt.

    All 0 for a request that ended before its first token: as in the metrics, its prompt was not answered. Of several
    answers the first counts the prompt.
    """
    if not sequence.clock.first_token:
        return decode_pb2.Usage()
    if sequence.answer:
        return decode_pb2.Usage(completion_tokens=completion_tokens)
    prompt = sequence.composition.prompt_tokens
    cached = sequence.composition.cached_tokens
    return decode_pb2.Usage(
        prompt_tokens=prompt,
        cached_tokens=cached,
        computed_tokens=prompt - cached,
        completion_tokens=completion_tokens,
    )


def reuse_out(composition: Composition, query_level: int = 0) -> decode_pb2.ReuseReport:
    """What was reused, or would be, segment by segment. ``query_level``: in which the tail is read."""
    report = decode_pb2.ReuseReport(reuse_mode=wire.reuse_mode_out(composition.mode))
    report.order, report.reordered = _ORDERS_OUT[composition.order], composition.reordered
    kinds = [composition.exactness(chunk) for chunk in composition.chunks]
    weakest = Exactness.EXACT_BLOCK_MASK if Exactness.EXACT_BLOCK_MASK in kinds else Exactness.EXACT_CONTEXT
    report.exactness = wire.exactness_out(weakest)
    for chunk, kind in zip(composition.chunks, kinds, strict=True):
        found = _segment_out(chunk.segment, chunk.outcome or ChunkOutcome(KVSource.COMPUTED), kind, chunk.level)
        found.cached_tokens, found.offset, found.given_index = chunk.cached_tokens, chunk.offset, chunk.given_index
        report.segments.append(found)
    if composition.query is not None:
        computed = ChunkOutcome(KVSource.COMPUTED)
        report.segments.append(_segment_out(composition.query, computed, Exactness.EXACT_CONTEXT, query_level))
        report.segments[-1].given_index = len(composition.chunks)
    return report


def _segment_out(segment: Segment, outcome: ChunkOutcome, kind: Exactness, level: int) -> decode_pb2.SegmentReport:
    return decode_pb2.SegmentReport(
        chunk_id=segment.chunk_id,
        name=segment.name,
        type=wire.chunk_type_out(segment.type),
        tokens=len(segment.token_ids),
        source=_SOURCES[outcome.source],
        level=level,
        exactness=wire.exactness_out(kind),
        miss_reason=wire.miss_reason_out(outcome.miss_reason),
        unpublished=_UNPUBLISHED[outcome.unpublished],
    )


def sequence_reuse_out(sequence: Sequence) -> decode_pb2.ReuseReport:
    """The reuse report of a request; of one that ended before its first token no source is known."""
    report = reuse_out(sequence.composition, sequence.tail_level or 0)
    if not sequence.clock.first_token:
        for segment in report.segments:
            segment.source, segment.cached_tokens = decode_pb2.KV_SOURCE_UNSPECIFIED, 0
            segment.ClearField("miss_reason")
            segment.ClearField("unpublished")
    return report
