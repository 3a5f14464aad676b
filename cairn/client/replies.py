"""Protobuf replies as what a client gives its caller. Touches no network."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

from google.protobuf.message import Message
from google.rpc import code_pb2

from cairn.client.answers import Delta, Explanation, Kept, PromptLogprob, Result, ToolCallDelta
from cairn.client.chunks import Chunk, Deleted, StoredChunk, StoreStats
from cairn.client.errors import CairnError, error_from_status
from cairn.client.loads import Loads, ModeSupport, Replica
from cairn.client.prompt import ToolCall
from cairn.client.reports import ChatReport, ReuseReport, SegmentReport, Timings, Usage
from protos import chunks_pb2, decode_pb2, prefill_pb2

_STATUS_NAMES: dict[int, str] = {number: name for name, number in code_pb2.Code.items()}


def parse_chunk(reply: prefill_pb2.PrefillChunkResponse, request: prefill_pb2.PrefillChunkRequest) -> Chunk:
    """What ``prefill`` returns; name and type are the request's own."""
    return Chunk(
        id=reply.chunk_id,
        key=reply.key,
        tokens=reply.tokens,
        outcome=_name(prefill_pb2.PrefillChunkResponse.Outcome, reply.outcome, "OUTCOME_"),
        computed_tokens=reply.computed_tokens,
        reused_tokens=reply.reused_tokens,
        timings=parse_timings(reply.timings),
        name=request.name,
        type=_chunk_type(request.type) or "context",
        newly_registered=reply.newly_registered,
        model_identity=reply.model_identity,
        durable=reply.durable,
    )


def parse_chunk_or_error(
    reply: prefill_pb2.PrefillChunksResponse, request: prefill_pb2.PrefillChunkRequest, source: str, request_id: str
) -> Chunk | CairnError:
    """One item of ``prefill_many``: a failed one is an error *value*, for the stream goes on."""
    if reply.WhichOneof("result") == "response":
        return parse_chunk(reply.response, request)
    code = _STATUS_NAMES.get(reply.error.code, "UNKNOWN")
    return error_from_status(code, reply.error.message, source, request.request_id or request_id)


def parse_stored_chunk(reply: chunks_pb2.Chunk) -> StoredChunk:
    return StoredChunk(
        id=reply.chunk_id,
        type=_chunk_type(reply.type),
        name=reply.name,
        tags=tuple(reply.tags),
        tokens=reply.tokens,
        pinned=reply.pinned,
        created_unix_s=reply.created_unix_s,
        last_used_unix_s=reply.last_used_unix_s,
        expires_unix_s=reply.expires_unix_s or None,
        kv_entries=reply.kv_entries,
        kv_bytes=reply.kv_bytes,
        token_ids=tuple(reply.token_ids),
        text=reply.text,
        shared=reply.shared,
    )


def parse_page(reply: prefill_pb2.ListChunksResponse) -> tuple[tuple[StoredChunk, ...], str]:
    """A page of chunks and the token of the next page, empty on the last."""
    return tuple(parse_stored_chunk(chunk) for chunk in reply.chunks), reply.next_page_token


def parse_deleted(reply: prefill_pb2.DeleteChunkResponse) -> Deleted:
    return Deleted(kv_entries=reply.kv_entries, kv_bytes=reply.kv_bytes)


def parse_aborted(reply: decode_pb2.AbortResponse) -> bool:
    return reply.found


def parse_delta(delta: decode_pb2.Delta) -> Delta:
    return Delta(
        text=delta.text,
        token_ids=tuple(delta.token_ids),
        logprobs=tuple(delta.logprobs),
        top_logprobs=tuple(tuple(zip(top.token_ids, top.logprobs, strict=True)) for top in delta.top_logprobs),
        token_bytes=dict(delta.token_bytes),
        index=delta.index,
        reasoning=delta.reasoning,
        tool_calls=tuple(ToolCallDelta(call.index, call.id, call.name, call.arguments) for call in delta.tool_calls),
    )


def parse_result(complete: decode_pb2.Complete, deltas: list[Delta]) -> Result:
    """The final message of an answer together with what was streamed of it before."""
    return Result(
        request_id=complete.request_id,
        text="".join(delta.text for delta in deltas),
        token_ids=tuple(token for delta in deltas for token in delta.token_ids),
        logprobs=tuple(value for delta in deltas for value in delta.logprobs),
        finish_reason=complete.finish_reason,
        usage=Usage(**_numbers(complete.usage, Usage)),
        reuse=parse_reuse(complete.reuse),
        timings=parse_timings(complete.timings),
        seed=complete.seed,
        model_name=complete.model_name,
        top_logprobs=tuple(top for delta in deltas for top in delta.top_logprobs),
        kept=_kept(complete.kept) if complete.HasField("kept") else None,
        index=complete.index,
        prompt_logprobs=tuple(map(_prompt_logprob, complete.prompt_logprobs)),
        chat=_chat(complete.chat) if complete.HasField("chat") else None,
        reasoning="".join(delta.reasoning for delta in deltas),
        preemptions=complete.preemptions,
        tool_calls=tool_calls(deltas),
        token_bytes={
            **complete.token_bytes,
            **{token: spelt for delta in deltas for token, spelt in delta.token_bytes.items()},
        },
    )


def tool_calls(deltas: Iterable[Delta]) -> tuple[ToolCall, ...]:
    """The calls of one answer, put together in the order in which they began."""
    calls: dict[int, ToolCall] = {}
    for new in (call for delta in deltas for call in delta.tool_calls):
        call = calls.get(new.index, ToolCall("", "", ""))
        calls[new.index] = ToolCall(call.id or new.id, call.name or new.name, call.arguments + new.arguments)
    return tuple(calls.values())


def _chat(reply: decode_pb2.ChatReport) -> ChatReport:
    return ChatReport(reply.pieces, reply.turns_kept, reply.rendered_again, reply.tool_calls_broken)


def _prompt_logprob(reply: decode_pb2.PromptLogprob) -> PromptLogprob:
    logprob = reply.logprob if reply.HasField("logprob") else None
    return PromptLogprob(reply.token_id, logprob, tuple(zip(reply.top.token_ids, reply.top.logprobs, strict=True)))


def _kept(reply: decode_pb2.Kept) -> Kept:
    return Kept(
        id=reply.chunk_id,
        registered=reply.registered,
        kv=_name(decode_pb2.KeptKv, reply.kv, "KEPT_KV_"),
        reason=_name(decode_pb2.NotKept, reply.reason, "NOT_KEPT_"),
        query_token_ids=tuple(reply.query_token_ids),
    )


def parse_reuse(reply: decode_pb2.ReuseReport) -> ReuseReport:
    return ReuseReport(
        reuse_mode=_reuse_mode(reply.reuse_mode),
        exactness=_exactness(reply.exactness),
        segments=tuple(_segment(segment) for segment in reply.segments),
        order=_name(decode_pb2.ChunkOrder, reply.order, "CHUNK_ORDER_"),
        reordered=reply.reordered,
    )


def parse_explanation(reply: decode_pb2.ExplainResponse) -> Explanation:
    told = Explanation.__dataclass_fields__.keys() - {"reuse", "chat"}
    chat = _chat(reply.chat) if reply.HasField("chat") else None
    return Explanation(reuse=parse_reuse(reply.reuse), chat=chat, **{name: getattr(reply, name) for name in told})


def parse_timings(reply: chunks_pb2.StageTimings) -> Timings:
    return Timings(
        queue_s=reply.queue_ns / 1e9,
        tokenize_s=reply.tokenize_ns / 1e9,
        lookup_s=reply.lookup_ns / 1e9,
        prefill_s=reply.prefill_ns / 1e9,
        publish_s=reply.publish_ns / 1e9,
        load_s=reply.load_ns / 1e9,
        forward_s=reply.forward_ns / 1e9,
        first_token_s=reply.first_token_ns / 1e9,
        decode_s=reply.decode_ns / 1e9,
        total_s=reply.total_ns / 1e9,
    )


def parse_stats(reply: prefill_pb2.StoreStatsResponse) -> StoreStats:
    return StoreStats(**_numbers(reply, StoreStats))


def parse_loads(reply: decode_pb2.GetLoadsResponse) -> Loads:
    modes = tuple(
        ModeSupport(_reuse_mode(mode.mode), mode.supported, mode.reason, mode.context_length_max)
        for mode in reply.modes
    )
    plain = Loads.__dataclass_fields__.keys() - {"modes", "replicas"}
    return Loads(**{name: getattr(reply, name) for name in plain}, modes=modes)


SUMS = (
    *("running", "waiting", "waiting_max", "batch_max"),
    *("pages_total", "pages_free", "pages_chunks", "pages_tails", "chunks_resident"),
    *("steps", "step_bytes_read", "step_bytes_flat"),
)


def loads_of_all(replicas: Iterable[Replica]) -> Loads:
    """The loads of replicas as those of one service; of one at least they are known."""
    each = tuple(replicas)
    used = [replica.loads for replica in each if replica.loads and replica.state != "differs"]
    found = used or [replica.loads for replica in each if replica.loads]
    sums = {name: sum(getattr(loads, name) for loads in found) for name in SUMS}
    least = min(found, key=lambda loads: loads.context_length_max)
    same_bits = all(loads.same_bits for loads in found)
    return replace(least, **sums, same_bits=same_bits, replicas=each)


def _segment(reply: decode_pb2.SegmentReport) -> SegmentReport:
    return SegmentReport(
        chunk_id=reply.chunk_id,
        name=reply.name,
        type=_chunk_type(reply.type),
        tokens=reply.tokens,
        cached_tokens=reply.cached_tokens,
        source=_name(decode_pb2.KvSource, reply.source, "KV_SOURCE_"),
        level=reply.level,
        offset=reply.offset,
        exactness=_exactness(reply.exactness),
        miss_reason=_name(chunks_pb2.MissReason, reply.miss_reason, "MISS_REASON_"),
        unpublished=_name(chunks_pb2.Unpublished, reply.unpublished, "UNPUBLISHED_"),
        given_index=reply.given_index,
    )


def _numbers(reply: Message, target: type) -> dict[str, Any]:
    """The fields of a message whose names are those of a dataclass."""
    return {name: getattr(reply, name) for name in target.__dataclass_fields__}  # type: ignore[attr-defined]


def _chunk_type(value: int) -> str:
    return _name(chunks_pb2.ChunkType, value, "CHUNK_TYPE_")


def _reuse_mode(value: int) -> str:
    return _name(chunks_pb2.ReuseMode, value, "REUSE_MODE_")


def _exactness(value: int) -> str:
    return _name(chunks_pb2.Exactness, value, "EXACTNESS_")


def _name(enum: Any, value: int, prefix: str) -> str:
    """An enumeration value's lower-case name, "" for unspecified, its number if a newer server sent it."""
    if value == 0:
        return ""
    if value not in enum.values():
        return str(value)
    return str(enum.Name(value)).removeprefix(prefix).lower()
