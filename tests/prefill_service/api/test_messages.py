"""Messages of prefill.proto as plain values, and back."""

from __future__ import annotations

from typing import Any

import pytest

from chunk_store.entry import EntryInfo
from chunk_store.key import ChunkId, ChunkKey, ChunkType, ModelIdentity, TokenizerIdentity
from chunk_store.record import ChunkRecord, RecordOrder
from chunk_store.store import StoreStats
from chunk_store.tenant import SHARED_TENANT, Tenant, TenantUsage
from engine.reuse import KeyedChunk, ReuseMode
from prefill_service.api import messages
from prefill_service.jobs.job import PrefillResult
from prefill_service.jobs.resolver import PrefillJob
from protos import chunks_pb2, prefill_pb2
from serving.errors import InvalidRequest
from serving.rpc.field_bounds import ContentBudget
from serving.tenancy.quotas import Quotas
from tests.fakes import MODEL

NAME = ChunkId("c" * 64)
MINE = Tenant("a" * 64)


def asked(**fields: Any) -> Any:
    message = prefill_pb2.PrefillChunkRequest(**fields)
    return messages.chunk_request(message, "salt", ContentBudget(100))


def test_a_request_is_what_it_says() -> None:
    plain = asked(
        text="hello",
        type=chunks_pb2.CHUNK_TYPE_CODE,
        context_chunk_ids=["a", "b"],
        reuse_mode=chunks_pb2.REUSE_MODE_INDEPENDENT,
        name="n",
        tags=["t", "u"],
        ttl_s=1.5,
        pin=True,
        role="user",
        salt="not this one",
    )
    assert (plain.text, plain.token_ids, plain.chunk_id) == ("hello", None, None)
    assert (plain.type, plain.mode, plain.context) == (ChunkType.CODE, ReuseMode.INDEPENDENT, ("a", "b"))
    assert (plain.name, plain.tags, plain.ttl_s, plain.pin, plain.role) == ("n", ("t", "u"), 1.5, True, "user")
    assert plain.salt == "salt"


def test_contents_that_are_empty_are_still_told_apart() -> None:
    assert asked(text="").text == "" and asked(chunk_id="").chunk_id == ""
    assert asked(token_ids=chunks_pb2.TokenIds()).token_ids == ()
    ids = asked(token_ids=chunks_pb2.TokenIds(ids=[1, 2]))
    assert (ids.text, ids.token_ids, ids.type, ids.mode) == (None, (1, 2), ChunkType.CONTEXT, ReuseMode.EXACT)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({}, "^content: missing"),
        ({"text": "x", "name": "n" * 1000}, "^name:"),
        ({"text": "x", "tags": ["ok", "t" * 1000]}, r"^tags\[1\]:"),
        ({"text": "x", "tags": ["t"] * (messages.TAGS_MAX + 1)}, "^tags:"),
        ({"text": "x", "context_chunk_ids": ["a"] * (messages.CONTEXT_CHUNKS_MAX + 1)}, "^context_chunk_ids:"),
        ({"text": "x", "context_chunk_ids": ["a" * 1000]}, r"^context_chunk_ids\[0\]:"),
        ({"chunk_id": "a" * 1000}, "^chunk_id:"),
        ({"token_ids": chunks_pb2.TokenIds(ids=[1] * 101)}, "^token_ids:"),
    ],
)
def test_what_is_out_of_bounds_is_named(fields: dict[str, Any], words: str) -> None:
    with pytest.raises(InvalidRequest, match=words):
        asked(**fields)


def listing(**fields: Any) -> Any:
    return messages.record_query(prefill_pb2.ListChunksRequest(**fields), MINE)


def test_a_listing_shows_the_tenants_own_and_what_is_shared() -> None:
    plain = listing()
    assert (plain.type, plain.order, plain.limit) == (None, RecordOrder.CREATED, messages.LIST_PAGE_DEFAULT)
    assert set(plain.tenants) == {MINE, SHARED_TENANT}
    full = listing(type=chunks_pb2.CHUNK_TYPE_QUERY, tag="t", name="n", page_size=7, page_token="p", order=2)
    assert (full.type, full.tag, full.name, full.limit, full.cursor) == (ChunkType.QUERY, "t", "n", 7, "p")
    assert full.order is RecordOrder.LAST_USED


@pytest.mark.parametrize(
    ("fields", "field"),
    [({"page_size": 1001}, "page_size"), ({"order": 99}, "order"), ({"page_token": "p" * 5000}, "page_token"),
     ({"tag": "t" * 1000}, "tag"), ({"type": 99}, "type")],
)  # fmt: skip
def test_a_listing_out_of_bounds_is_refused(fields: dict[str, Any], field: str) -> None:
    with pytest.raises(InvalidRequest, match=field):
        listing(**fields)


@pytest.mark.parametrize(("computed", "outcome"), [(3, "OUTCOME_COMPUTED"), (0, "OUTCOME_ALREADY_STORED")])
def test_a_reply_says_what_became_of_the_job(computed: int, outcome: str) -> None:
    chunk = KeyedChunk(ChunkKey("k" * 64), (1, 2, 3), (), 0, 0)
    job = PrefillJob((NAME,), (chunk,), (0,), (0,), MINE, Quotas().limits, newly_registered=True)
    reply = messages.prefill_response(
        PrefillResult(job, computed, 5, {"total": 9, "load": 2}, durable=computed == 0), MODEL
    )
    assert reply.outcome == getattr(prefill_pb2.PrefillChunkResponse, outcome)
    assert (reply.chunk_id, reply.key, reply.tokens, reply.computed_tokens) == (NAME, "k" * 64, 3, computed)
    assert (reply.reused_tokens, reply.newly_registered, reply.model_identity) == (5, True, MODEL)
    assert (reply.timings.total_ns, reply.timings.load_ns, reply.durable) == (9, 2, computed == 0)


def test_a_chunk_counts_its_own_entries_only() -> None:
    def entry(name: str, tenant: Tenant, nbytes: int) -> EntryInfo:
        return EntryInfo(ChunkKey("k"), ChunkId(name), ModelIdentity("m"), 3, nbytes, 0.0, 0.0, tenant)

    record = ChunkRecord(
        NAME, TokenizerIdentity("t"), ChunkType.CODE, (1, 2, 3), "n", ("a",), True, 1.0, 2.0, None, MINE
    )
    entries = [entry(NAME, MINE, 10), entry(NAME, MINE, 5), entry(NAME, SHARED_TENANT, 100), entry("other", MINE, 1)]
    message = messages.chunk_message(record, entries)
    assert (message.kv_entries, message.kv_bytes, message.tokens, message.shared) == (2, 15, 3, False)
    assert (message.created_unix_s, message.last_used_unix_s, message.expires_unix_s) == (1.0, 2.0, 0.0)
    assert (message.name, list(message.tags), message.pinned) == ("n", ["a"], True)


def test_a_tenants_numbers_say_nothing_of_others() -> None:
    stats = StoreStats("file", records=9, entries=8, nbytes=7000, capacity_nbytes=10_000, records_max=50,
                       pinned_entries=3, leased_entries=2, evictions=4, quarantined=1)  # fmt: skip
    usage = TenantUsage(records=2, entries=1, nbytes=700, pinned_entries=1, leased_entries=0)
    mine = messages.usage_message(stats, usage, Quotas(chunks=5), MODEL, "tiny")
    assert (mine.chunks, mine.chunks_max, mine.kv_entries, mine.kv_bytes) == (2, 5, 1, 700)
    assert (mine.capacity_bytes, mine.evictions, mine.quarantined, mine.whole_store) == (10_000, 0, 0, False)
    everything = messages.stats_message(stats, MODEL, "tiny")
    assert (everything.chunks, everything.kv_bytes, everything.evictions, everything.whole_store) == (9, 7000, 4, True)


def test_an_administrative_request_names_a_chunk() -> None:
    assert messages.chunk_id_of(NAME) == NAME
    with pytest.raises(InvalidRequest, match="chunk_id: missing"):
        messages.chunk_id_of("")
