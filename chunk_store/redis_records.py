"""Content in Redis: reading records and pages of them. Writing is one script (``PUT_RECORDS``)."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import Any

from chunk_store.key import ChunkId, ChunkType, TokenizerIdentity, pack_token_ids, unpack_token_ids
from chunk_store.records import LIST_LIMIT_MAX, decode_cursor, encode_cursor
from chunk_store.redis_connection import RedisConnection
from chunk_store.store import ChunkRecord, RecordOrder, RecordPage, RecordQuery

_INDEX = {RecordOrder.CREATED: "records_created", RecordOrder.LAST_USED: "records_used"}
STEP_RECORDS = 200


def arguments(record: ChunkRecord) -> list[str | bytes]:
    """A record as ``PUT_RECORDS`` wants it."""
    return [
        record.chunk_id,
        record.tokenizer,
        record.type.value,
        pack_token_ids(record.token_ids),
        record.name,
        json.dumps(list(dict.fromkeys(record.tags))),
        "1" if record.pinned else "0",
        repr(record.created_at),
        repr(record.last_used_at),
        "" if record.expires_at is None else repr(record.expires_at),
    ]


def get(connection: RedisConnection, chunk_ids: Sequence[ChunkId]) -> list[ChunkRecord | None]:
    """Records by id in one round trip; None where unknown or expired by the server's clock."""
    with connection.errors(), connection.client.pipeline(transaction=False) as pipeline:
        pipeline.time()
        for chunk_id in chunk_ids:
            pipeline.hgetall(connection.name(f"record:{chunk_id}"))
            pipeline.zscore(connection.name("records_used"), chunk_id)
        clock, *answers = pipeline.execute()
    now = clock[0] + clock[1] / 1e6
    found = zip(chunk_ids, answers[::2], answers[1::2], strict=True)
    return [_record(chunk_id, fields, used, now) for chunk_id, fields, used in found]


def page(connection: RedisConnection, query: RecordQuery) -> RecordPage:
    """A page by keyset: walks the index of its order from the cursor on."""
    if not 1 <= query.limit <= LIST_LIMIT_MAX:
        raise ValueError(f"limit: {query.limit} is not in 1..{LIST_LIMIT_MAX}")
    after = decode_cursor(query.cursor, query.order) if query.cursor else None
    tagged = _tagged(connection, query.tag)
    found: list[ChunkRecord] = []
    for batch in _walk(connection, query.order, after):
        wanted = [chunk_id for chunk_id in batch if tagged is None or chunk_id in tagged]
        for record in get(connection, wanted):
            if record is not None and _matches(record, query):
                found.append(record)
        if len(found) > query.limit:
            break
    records = tuple(found[: query.limit])
    return RecordPage(records, encode_cursor(query.order, records[-1]) if len(found) > query.limit else "")


def _matches(record: ChunkRecord, query: RecordQuery) -> bool:
    return (query.type is None or record.type is query.type) and query.name in ("", record.name)


def _tagged(connection: RedisConnection, tag: str) -> set[str] | None:
    if not tag:
        return None
    with connection.errors():
        return {member.decode() for member in connection.client.smembers(connection.name(f"tag:{tag}"))}


def _walk(
    connection: RedisConnection, order: RecordOrder, after: tuple[float | str, str] | None
) -> Iterator[list[ChunkId]]:
    """Ids in order behind ``after``, in batches."""
    while True:
        if order is RecordOrder.NAME:
            batch, after = _named(connection, after)
        else:
            batch, after = _scored(connection, _INDEX[order], after)
        if not batch:
            return
        yield batch


def _named(
    connection: RedisConnection, after: tuple[float | str, str] | None
) -> tuple[list[ChunkId], tuple[float | str, str] | None]:
    low = b"-" if after is None else b"(" + f"{after[0]}\0{after[1]}".encode()
    with connection.errors():
        members = connection.client.zrangebylex(connection.name("records_named"), low, b"+", start=0, num=STEP_RECORDS)
    pairs = [member.decode().rpartition("\0") for member in members]
    return [ChunkId(pair[2]) for pair in pairs], (pairs[-1][0], pairs[-1][2]) if pairs else None


def _scored(
    connection: RedisConnection, index: str, after: tuple[float | str, str] | None
) -> tuple[list[ChunkId], tuple[float | str, str] | None]:
    """Equal scores are ordered by id, as the cursor is; so what stands at its score up to its id is skipped."""
    low, last, skip = ("-inf", "", 0) if after is None else (repr(after[0]), after[1], 0)
    while True:
        with connection.errors():
            members = connection.client.zrangebyscore(
                connection.name(index), low, "+inf", start=skip, num=STEP_RECORDS, withscores=True
            )
        fresh = [
            (member.decode(), score)
            for member, score in members
            if after is None or (score, member.decode()) > (after[0], last)
        ]
        if fresh or not members:
            break
        skip += len(members)
    return [ChunkId(member) for member, _ in fresh], (fresh[-1][1], fresh[-1][0]) if fresh else None


def _record(chunk_id: ChunkId, fields: dict[bytes, bytes], used: float | None, now: float) -> ChunkRecord | None:
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
    )
