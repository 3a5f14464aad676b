"""Content in Redis: reading records and pages of them. Writing is one script (``PUT_RECORDS``)."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import Any

from chunk_store.format.pages import After, merged_page, sort_value
from chunk_store.key import ChunkId, ChunkType, TokenizerIdentity, pack_token_ids, unpack_token_ids
from chunk_store.record import ChunkRecord, RecordOrder, RecordPage, RecordQuery
from chunk_store.redis.connection import RedisConnection
from chunk_store.tenant import DEFAULT_TENANT, Tenant, Tenants

_INDEX = {RecordOrder.CREATED: "records_created", RecordOrder.LAST_USED: "records_used"}
STEP_RECORDS = 200


def arguments(record: ChunkRecord) -> list[str | bytes]:
    """A record as ``PUT_RECORDS`` wants it."""
    return [
        sid(record.tenant, record.chunk_id),
        record.tokenizer,
        record.type.value,
        pack_token_ids(record.token_ids),
        record.name,
        json.dumps(list(dict.fromkeys(record.tags))),
        "1" if record.pinned else "0",
        repr(record.created_at),
        repr(record.last_used_at),
        "" if record.expires_at is None else repr(record.expires_at),
        "1" if record.transient else "0",
    ]


def sid(tenant: Tenant, chunk_id: str) -> str:
    """How the scripts know a tenant's chunk."""
    return f"{tenant}/{chunk_id}" if tenant else chunk_id


def index_name(connection: RedisConnection, tenant: Tenant, name: str) -> str:
    """The key of what belongs to one tenant."""
    return connection.name(f"{name}@{tenant}" if tenant else name)


def named(connection: RedisConnection, tenants: Tenants) -> Sequence[Tenant]:
    """The tenants themselves: those given, or all that there are."""
    if tenants is not None:
        return tenants
    with connection.errors():
        others = connection.client.smembers(connection.name("tenants"))
    return [DEFAULT_TENANT, *sorted(Tenant(name.decode()) for name in others)]


def get(connection: RedisConnection, chunk_ids: Sequence[ChunkId], tenants: Tenants) -> list[ChunkRecord | None]:
    """Of each id the record of the first tenant that has one, in one round trip; None where unknown or expired by
    the server's clock."""
    places = [(tenant, chunk_id) for tenant in named(connection, tenants) for chunk_id in chunk_ids]
    with connection.errors(), connection.client.pipeline(transaction=False) as pipeline:
        pipeline.time()
        for tenant, chunk_id in places:
            pipeline.hgetall(connection.name(f"record:{sid(tenant, chunk_id)}"))
            pipeline.zscore(index_name(connection, tenant, "records_used"), chunk_id)
        clock, *answers = pipeline.execute()
    now = clock[0] + clock[1] / 1e6
    found: dict[ChunkId, ChunkRecord] = {}
    for (tenant, chunk_id), fields, used in zip(places, answers[::2], answers[1::2], strict=True):
        record = _record(tenant, chunk_id, fields, used, now)
        if record is not None:
            found.setdefault(chunk_id, record)
    return [found.get(chunk_id) for chunk_id in chunk_ids]


def page(connection: RedisConnection, query: RecordQuery) -> RecordPage:
    """A page by keyset: walks the indexes of its order from the cursor on."""

    def walk(tenant: Tenant, after: After | None, at_too: bool) -> Iterator[ChunkRecord]:
        return _matching(connection, query, tenant, after, at_too)

    return merged_page(query, named(connection, query.tenants), walk)


def _matching(
    connection: RedisConnection, query: RecordQuery, tenant: Tenant, after: After | None, at_too: bool
) -> Iterator[ChunkRecord]:
    tagged = _tagged(connection, tenant, query.tag)
    place = None if after is None else (after.value, after.chunk_id)
    if after is not None and at_too:
        yield from _wanted(connection, query, tenant, [ChunkId(after.chunk_id)], tagged, place)
    for batch in _walk(connection, tenant, query.order, place):
        yield from _wanted(connection, query, tenant, batch, tagged, None)


def _wanted(
    connection: RedisConnection,
    query: RecordQuery,
    tenant: Tenant,
    batch: Sequence[ChunkId],
    tagged: set[str] | None,
    place: tuple[float | str, str] | None,
) -> Iterator[ChunkRecord]:
    """Of ``batch`` the records that match; with ``place`` only one that stands exactly there."""
    chosen = [chunk_id for chunk_id in batch if tagged is None or chunk_id in tagged]
    for record in get(connection, chosen, [tenant]):
        if record is None or query.type not in (None, record.type) or query.name not in ("", record.name):
            continue
        if place is None or place[0] == sort_value(query.order, record):
            yield record


def _tagged(connection: RedisConnection, tenant: Tenant, tag: str) -> set[str] | None:
    if not tag:
        return None
    with connection.errors():
        members = connection.client.smembers(f"{index_name(connection, tenant, 'tag')}:{tag}")
    return {member.decode() for member in members}


def _walk(
    connection: RedisConnection, tenant: Tenant, order: RecordOrder, after: tuple[float | str, str] | None
) -> Iterator[list[ChunkId]]:
    """Ids in order behind ``after``, in batches."""
    while True:
        if order is RecordOrder.NAME:
            batch, after = _named(connection, index_name(connection, tenant, "records_named"), after)
        else:
            batch, after = _scored(connection, index_name(connection, tenant, _INDEX[order]), after)
        if not batch:
            return
        yield batch


def _named(
    connection: RedisConnection, index: str, after: tuple[float | str, str] | None
) -> tuple[list[ChunkId], tuple[float | str, str] | None]:
    low = b"-" if after is None else b"(" + f"{after[0]}\0{after[1]}".encode()
    with connection.errors():
        members = connection.client.zrangebylex(index, low, b"+", start=0, num=STEP_RECORDS)
    pairs = [member.decode().rpartition("\0") for member in members]
    return [ChunkId(pair[2]) for pair in pairs], (pairs[-1][0], pairs[-1][2]) if pairs else None


def _scored(
    connection: RedisConnection, index: str, after: tuple[float | str, str] | None
) -> tuple[list[ChunkId], tuple[float | str, str] | None]:
    """Equal scores are ordered by id, as the cursor is; so what stands at its score up to its id is skipped."""
    low, last, skip = ("-inf", "", 0) if after is None else (repr(after[0]), after[1], 0)
    while True:
        with connection.errors():
            members = connection.client.zrangebyscore(index, low, "+inf", start=skip, num=STEP_RECORDS, withscores=True)
        fresh = [
            (member.decode(), score)
            for member, score in members
            if after is None or (score, member.decode()) > (after[0], last)
        ]
        if fresh or not members:
            break
        skip += len(members)
    return [ChunkId(member) for member, _ in fresh], (fresh[-1][1], fresh[-1][0]) if fresh else None


def _record(
    tenant: Tenant, chunk_id: ChunkId, fields: dict[bytes, bytes], used: float | None, now: float
) -> ChunkRecord | None:
    if not fields:
        return None
    text: dict[str, Any] = {name.decode(): value for name, value in fields.items()}
    expires_at = float(text["expires"]) if text["expires"] else None
    pinned = text["pinned"] == b"1"
    if not pinned and expires_at is not None and expires_at <= now:
        return None
    return ChunkRecord(
        chunk_id=chunk_id,
        tokenizer=TokenizerIdentity(text["tokenizer"].decode()),
        type=ChunkType(text["type"].decode()),
        token_ids=unpack_token_ids(text["tokens"]),
        name=text["name"].decode(),
        tags=tuple(json.loads(text["tags"])),
        pinned=pinned,
        created_at=float(text["created"]),
        last_used_at=float(used or 0.0),
        expires_at=expires_at,
        tenant=tenant,
        transient=text.get("transient") == b"1",  # a store of before had none
    )
