"""Between the messages of prefill.proto and plain values."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import pairwise

from chunk_store.entry import EntryInfo
from chunk_store.key import ChunkId
from chunk_store.record import ChunkRecord, RecordOrder, RecordQuery
from chunk_store.store import StoreStats
from chunk_store.tenant import SHARED_TENANT, Tenant, TenantUsage, visible_to
from engine.kv.source import KVSource
from prefill_service.jobs.job import PrefillResult
from prefill_service.jobs.progress import ChunkMade
from prefill_service.jobs.resolver import ChunkRequest, CompositionRequest, PrefillJob
from protos import chunks_pb2, prefill_pb2
from serving.errors import STORE_FULL, STORE_UNAVAILABLE, InvalidRequest, request_error
from serving.rpc import wire
from serving.rpc.access import Caller
from serving.rpc.errors import status_name
from serving.rpc.field_bounds import ContentBudget, check_count, check_id, check_label
from serving.tenancy.quotas import Quotas

LIST_PAGE_DEFAULT = 100
LIST_PAGE_MAX = 1000
TAGS_MAX = 64
CONTEXT_CHUNKS_MAX = 1024
PAGE_TOKEN_CHARACTERS_MAX = 4096

_ORDERS = {
    prefill_pb2.ListChunksRequest.ORDER_UNSPECIFIED: RecordOrder.CREATED,
    prefill_pb2.ListChunksRequest.ORDER_CREATED: RecordOrder.CREATED,
    prefill_pb2.ListChunksRequest.ORDER_LAST_USED: RecordOrder.LAST_USED,
    prefill_pb2.ListChunksRequest.ORDER_NAME: RecordOrder.NAME,
}
_OUTCOMES = {
    "computed": prefill_pb2.PrefillChunkResponse.OUTCOME_COMPUTED,
    "already_stored": prefill_pb2.PrefillChunkResponse.OUTCOME_ALREADY_STORED,
}
_UNPUBLISHED = {
    "": chunks_pb2.UNPUBLISHED_UNSPECIFIED,
    STORE_FULL: chunks_pb2.UNPUBLISHED_STORE_FULL,
    STORE_UNAVAILABLE: chunks_pb2.UNPUBLISHED_STORE_UNAVAILABLE,
}


def chunk_request(message: prefill_pb2.PrefillChunkRequest, salt: str, budget: ContentBudget) -> ChunkRequest:
    """The request as plain values within ``budget``, under the caller's ``salt``. Raises ``RequestError``."""
    content = message.WhichOneof("content")
    if content is None:
        raise InvalidRequest("missing", field="content", remedy="give text, token_ids or chunk_id")
    _check_fields(message)
    if content == "text":
        budget.take_text("text", message.text)
    elif content == "token_ids":
        budget.take_tokens("token_ids", message.token_ids.ids)
    return ChunkRequest(
        text=message.text if content == "text" else None,
        token_ids=tuple(message.token_ids.ids) if content == "token_ids" else None,
        chunk_id=message.chunk_id if content == "chunk_id" else None,
        type=wire.chunk_type(message.type),
        context=tuple(message.context_chunk_ids),
        mode=wire.reuse_mode(message.reuse_mode),
        name=message.name,
        tags=tuple(message.tags),
        ttl_s=message.ttl_s,
        pin=message.pin,
        role=message.role,
        salt=salt,
        durable=message.durable,
    )


def _check_fields(message: prefill_pb2.PrefillChunkRequest) -> None:
    """Counts and lengths of everything but the content."""
    for field in ("name", "role", "salt"):
        check_label(field, getattr(message, field))
    check_id("chunk_id", message.chunk_id)
    check_count("tags", message.tags, TAGS_MAX)
    check_count("context_chunk_ids", message.context_chunk_ids, CONTEXT_CHUNKS_MAX, "join some")
    for index, tag in enumerate(message.tags):
        check_label(f"tags[{index}]", tag)
    for index, name in enumerate(message.context_chunk_ids):
        check_id(f"context_chunk_ids[{index}]", name)


def prefill_response(result: PrefillResult, model_identity: str) -> prefill_pb2.PrefillChunkResponse:
    return prefill_pb2.PrefillChunkResponse(
        chunk_id=result.job.chunk_id,
        key=result.job.key,
        outcome=_OUTCOMES["computed" if result.computed_tokens else "already_stored"],
        tokens=result.job.tokens,
        computed_tokens=result.computed_tokens,
        reused_tokens=result.reused_tokens,
        timings=wire.timings_out(result.spent_ns),
        model_identity=model_identity,
        newly_registered=result.job.newly_registered,
        durable=result.durable,
    )


def composition_request(message: prefill_pb2.PrefillCompositionRequest, caller: Caller) -> CompositionRequest:
    """The request as plain values, under the caller's salt. Raises ``RequestError``."""
    check_label("salt", message.salt)
    check_label("borrower", message.borrower)
    if not message.chunk_ids:
        raise InvalidRequest("missing", field="chunk_ids", remedy="name all chunks of the composition, in order")
    check_count("chunk_ids", message.chunk_ids, CONTEXT_CHUNKS_MAX + 1, "join some")
    for index, name in enumerate(message.chunk_ids):
        check_id(f"chunk_ids[{index}]", name)
    wanted = tuple(message.wanted)
    if not wanted:
        raise InvalidRequest("missing", field="wanted", remedy="name places in chunk_ids, the first is 0")
    check_count("wanted", wanted, len(message.chunk_ids), "name each place once")
    if any(before >= after for before, after in pairwise(wanted)):
        raise InvalidRequest("not ascending", field="wanted", remedy="name each place once, in order")
    if wanted[-1] >= len(message.chunk_ids):
        raise InvalidRequest(f"{wanted[-1]} is not a place in chunk_ids", field="wanted", remedy="the first is 0")
    borrower = message.borrower if caller.acts_for_all else ""
    mode = wire.reuse_mode(message.reuse_mode)
    ids = tuple(message.chunk_ids)
    return CompositionRequest(ids, wanted, mode, caller.salt, borrower=borrower, durable=message.durable)


def composition_response(job: PrefillJob, made: ChunkMade) -> prefill_pb2.PrefillCompositionResponse:
    refused = "" if made.unpublished is None else request_error(made.unpublished).reason or STORE_UNAVAILABLE
    response = prefill_pb2.PrefillCompositionResponse(
        index=made.index,
        key=job.chunks[made.index].key,
        outcome=_OUTCOMES.get(outcome(made), prefill_pb2.PrefillChunkResponse.OUTCOME_UNSPECIFIED),
        durable=made.durable,
        unpublished=_UNPUBLISHED[refused],
    )
    if made.lent is not None:
        lent = made.lent
        response.lent.CopyFrom(
            prefill_pb2.Lent(pool=lent.pool, lease=lent.lease, first_slot=lent.first_slot, tokens=lent.tokens)
        )
    return response


def outcome(made: ChunkMade) -> str:
    """What became of a chunk, in the words of the metrics."""
    if made.unpublished is not None:
        return status_name(request_error(made.unpublished)).lower()
    return "computed" if made.source is KVSource.COMPUTED else "already_stored"


def record_query(message: prefill_pb2.ListChunksRequest, tenant: Tenant) -> RecordQuery:
    """The filter and page that a tenant's listing asks for. Raises ``RequestError``."""
    if message.page_size > LIST_PAGE_MAX:
        raise InvalidRequest(f"{message.page_size} is more than {LIST_PAGE_MAX}", field="page_size")
    if message.order not in _ORDERS:
        raise InvalidRequest(f"{message.order} is unknown to this server", field="order")
    check_label("name", message.name)
    check_label("tag", message.tag)
    check_label("page_token", message.page_token, PAGE_TOKEN_CHARACTERS_MAX)
    unfiltered = message.type == chunks_pb2.CHUNK_TYPE_UNSPECIFIED
    return RecordQuery(
        type=None if unfiltered else wire.chunk_type(message.type),
        tag=message.tag,
        name=message.name,
        order=_ORDERS[message.order],
        limit=message.page_size or LIST_PAGE_DEFAULT,
        cursor=message.page_token,
        tenants=visible_to(tenant),
    )


def chunk_message(record: ChunkRecord, entries: Iterable[EntryInfo]) -> chunks_pb2.Chunk:
    """A registered chunk; of ``entries`` its own are counted."""
    place = (record.chunk_id, record.tenant)
    sizes = [entry.nbytes for entry in entries if (entry.chunk_id, entry.tenant) == place]
    return chunks_pb2.Chunk(
        chunk_id=record.chunk_id,
        type=wire.chunk_type_out(record.type),
        name=record.name,
        tags=record.tags,
        tokens=len(record.token_ids),
        pinned=record.pinned,
        created_unix_s=record.created_at,
        last_used_unix_s=record.last_used_at,
        expires_unix_s=record.expires_at or 0.0,
        kv_entries=len(sizes),
        kv_bytes=sum(sizes),
        shared=record.tenant == SHARED_TENANT,
    )


def usage_message(
    stats: StoreStats, usage: TenantUsage, quotas: Quotas, model_identity: str, model_name: str
) -> prefill_pb2.StoreStatsResponse:
    """What one tenant keeps; of the whole store only its kind and limits."""
    return prefill_pb2.StoreStatsResponse(
        backend=stats.backend,
        chunks=usage.records,
        chunks_max=stats.records_max if quotas.chunks is None else quotas.chunks,
        kv_entries=usage.entries,
        kv_bytes=usage.nbytes,
        capacity_bytes=stats.capacity_nbytes if quotas.bytes is None else quotas.bytes,
        pinned_entries=usage.pinned_entries,
        leased_entries=usage.leased_entries,
        model_identity=model_identity,
        model_name=model_name,
    )


def stats_message(stats: StoreStats, model_identity: str, model_name: str) -> prefill_pb2.StoreStatsResponse:
    return prefill_pb2.StoreStatsResponse(
        backend=stats.backend,
        chunks=stats.records,
        chunks_max=stats.records_max,
        kv_entries=stats.entries,
        kv_bytes=stats.nbytes,
        capacity_bytes=stats.capacity_nbytes,
        pinned_entries=stats.pinned_entries,
        leased_entries=stats.leased_entries,
        evictions=stats.evictions,
        quarantined=stats.quarantined,
        model_identity=model_identity,
        model_name=model_name,
        whole_store=True,
    )


def chunk_id_of(text: str) -> ChunkId:
    """The id that an administrative request names. Raises ``RequestError`` for an empty one."""
    if not text:
        raise InvalidRequest("missing", field="chunk_id")
    check_id("chunk_id", text)
    return ChunkId(text)
