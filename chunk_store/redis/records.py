"""Content in Redis: records and pages of them."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from chunk_store.errors import StoreFull
from chunk_store.format.pages import After, merged_page, sort_value
from chunk_store.key import ChunkId, ChunkType, TokenizerIdentity, pack_token_ids, unpack_token_ids
from chunk_store.limits import quota_full
from chunk_store.record import NO_CONTENT, ChunkRecord, Content, RecordOrder, RecordPage, RecordQuery
from chunk_store.redis.connection import RedisConnection
from chunk_store.redis.names import index_name, named, number, sid
from chunk_store.redis.scripts import records as scripts
from chunk_store.store import DeleteReport
from chunk_store.tenant import (
    DEFAULT_ONLY,
    DEFAULT_TENANT,
    NO_LIMITS,
    SHARED_TENANT,
    Tenant,
    TenantLimits,
    Tenants,
    visible_to,
)
from chunk_store.uses import Uses

_INDEX = {RecordOrder.CREATED: "records_created", RecordOrder.LAST_USED: "records_used"}
STEP_RECORDS = 200
_BUT_TOKENS = [
    *(b"tokenizer", b"type", b"name", b"tags", b"pinned", b"created", b"expires"),
    b"transient",
]  # all fields of a record but its content


class RedisRecords:
    """The ``Records`` of one Redis store: reading is done here, writing is one script."""

    def __init__(self, connection: RedisConnection, defaults: Mapping[str, int]) -> None:
        self._redis = connection
        self._defaults = defaults

    def put(self, records: Sequence[ChunkRecord], *, limits: TenantLimits = NO_LIMITS) -> list[bool]:
        if not records:
            return []
        fields = [field for record in records for field in _arguments(record)]
        most = (number(limits.records), number(limits.pinned))
        added = self._redis.run(scripts.PUT_RECORDS, self._defaults["records_max"], *most, *fields)
        if added == b"full":
            raise StoreFull("the registry is full: no room for these chunks", "delete chunks or raise records_max")
        _check_quota(added, limits)
        return [bool(new) for new in added]

    def get(
        self, chunk_ids: Sequence[ChunkId], tenants: Tenants = DEFAULT_ONLY, *, known: Content = NO_CONTENT
    ) -> list[ChunkRecord | None]:
        """Of each id the record of the first tenant that has one, in one round trip; None where unknown or expired by
        the server's clock."""
        places = [(tenant, chunk_id) for tenant in named(self._redis, tenants) for chunk_id in chunk_ids]
        with self._redis.errors(), self._redis.client.pipeline(transaction=False) as pipeline:
            pipeline.time()
            for tenant, chunk_id in places:
                name = self._redis.name(f"record:{sid(tenant, chunk_id)}")
                if chunk_id in known:
                    pipeline.hmget(name, _BUT_TOKENS)
                else:
                    pipeline.hgetall(name)
                pipeline.zscore(index_name(self._redis, tenant, "records_used"), chunk_id)
            clock, *answers = pipeline.execute()
        now = clock[0] + clock[1] / 1e6
        found: dict[ChunkId, ChunkRecord] = {}
        for (tenant, chunk_id), fields, used in zip(places, answers[::2], answers[1::2], strict=True):
            if chunk_id in known:
                fields = {name: value for name, value in zip(_BUT_TOKENS, fields, strict=True) if value is not None}
            record = _record(tenant, chunk_id, fields, used, now, known)
            if record is not None:
                found.setdefault(chunk_id, record)
        return [found.get(chunk_id) for chunk_id in chunk_ids]

    def page(self, query: RecordQuery) -> RecordPage:
        """A page by keyset: walks the indexes of its order from the cursor on."""

        def walk(tenant: Tenant, after: After | None, at_too: bool) -> Iterator[ChunkRecord]:
            return self._matching(query, tenant, after, at_too)

        return merged_page(query, named(self._redis, query.tenants), walk)

    def set_pinned(
        self,
        chunk_ids: Sequence[ChunkId],
        pinned: bool,
        tenant: Tenant = DEFAULT_TENANT,
        *,
        limits: TenantLimits = NO_LIMITS,
    ) -> list[bool]:
        answer = self._redis.run(scripts.SET_PINNED, int(pinned), tenant, number(limits.pinned), *chunk_ids)
        _check_quota(answer, limits)
        return [bool(known) for known in answer]

    def delete(self, chunk_ids: Sequence[ChunkId], tenants: Tenants = DEFAULT_ONLY) -> DeleteReport:
        places = [(tenant, name) for tenant in named(self._redis, tenants) for name in chunk_ids]
        sids = [sid(tenant, name) for tenant, name in places]
        return DeleteReport(*(int(count) for count in self._redis.run(scripts.DELETE_CHUNKS, *sids)))

    def add_uses(self, uses: Uses) -> None:
        given = list(uses.items())
        for first in range(0, len(given), STEP_RECORDS):
            step = given[first : first + STEP_RECORDS]
            args = [(user, sid(user, name), sid(SHARED_TENANT, name), more) for (user, name), more in step]
            self._redis.run(scripts.ADD_USES, *(value for each in args for value in each))

    def uses(self, chunk_ids: Sequence[ChunkId], tenant: Tenant) -> list[int]:
        owners = visible_to(tenant)
        with self._redis.errors(), self._redis.client.pipeline(transaction=False) as pipeline:
            for chunk_id in chunk_ids:
                for owner in owners:
                    pipeline.hget(self._redis.name(f"uses:{sid(owner, chunk_id)}"), tenant)
            counts = [int(count or 0) for count in pipeline.execute()]
        return [sum(counts[at : at + len(owners)]) for at in range(0, len(counts), len(owners))]

    def _matching(self, query: RecordQuery, tenant: Tenant, after: After | None, at_too: bool) -> Iterator[ChunkRecord]:
        tagged = self._tagged(tenant, query.tag)
        place = None if after is None else (after.value, after.chunk_id)
        if after is not None and at_too:
            yield from self._wanted(query, tenant, [ChunkId(after.chunk_id)], tagged, place)
        for batch in self._walk(tenant, query.order, place):
            yield from self._wanted(query, tenant, batch, tagged, None)

    def _wanted(
        self,
        query: RecordQuery,
        tenant: Tenant,
        batch: Sequence[ChunkId],
        tagged: set[str] | None,
        place: tuple[float | str, str] | None,
    ) -> Iterator[ChunkRecord]:
        """Of ``batch`` the records that match; with ``place`` only one that stands exactly there."""
        chosen = [chunk_id for chunk_id in batch if tagged is None or chunk_id in tagged]
        for record in self.get(chosen, [tenant]):
            if record is None or query.type not in (None, record.type) or query.name not in ("", record.name):
                continue
            if place is None or place[0] == sort_value(query.order, record):
                yield record

    def _tagged(self, tenant: Tenant, tag: str) -> set[str] | None:
        if not tag:
            return None
        with self._redis.errors():
            members = self._redis.client.smembers(f"{index_name(self._redis, tenant, 'tag')}:{tag}")
        return {member.decode() for member in members}

    def _walk(
        self, tenant: Tenant, order: RecordOrder, after: tuple[float | str, str] | None
    ) -> Iterator[list[ChunkId]]:
        """Ids in order behind ``after``, in batches."""
        while True:
            if order is RecordOrder.NAME:
                batch, after = self._by_name(index_name(self._redis, tenant, "records_named"), after)
            else:
                batch, after = self._by_time(index_name(self._redis, tenant, _INDEX[order]), after)
            if not batch:
                return
            yield batch

    def _by_name(
        self, index: str, after: tuple[float | str, str] | None
    ) -> tuple[list[ChunkId], tuple[float | str, str] | None]:
        low = b"-" if after is None else b"(" + f"{after[0]}\0{after[1]}".encode()
        with self._redis.errors():
            members = self._redis.client.zrangebylex(index, low, b"+", start=0, num=STEP_RECORDS)
        pairs = [member.decode().rpartition("\0") for member in members]
        return [ChunkId(pair[2]) for pair in pairs], (pairs[-1][0], pairs[-1][2]) if pairs else None

    def _by_time(
        self, index: str, after: tuple[float | str, str] | None
    ) -> tuple[list[ChunkId], tuple[float | str, str] | None]:
        """Equal scores are ordered by id, as the cursor is; so what stands at its score up to its id is skipped."""
        low, last, skip = ("-inf", "", 0) if after is None else (repr(after[0]), after[1], 0)
        while True:
            with self._redis.errors():
                members = self._redis.client.zrangebyscore(
                    index, low, "+inf", start=skip, num=STEP_RECORDS, withscores=True
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


def _arguments(record: ChunkRecord) -> list[str | bytes]:
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


def _record(
    tenant: Tenant,
    chunk_id: ChunkId,
    fields: dict[bytes, bytes],
    used: float | None,
    now: float,
    known: Content = NO_CONTENT,
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
        token_ids=known[chunk_id] if chunk_id in known else unpack_token_ids(text["tokens"]),
        name=text["name"].decode(),
        tags=tuple(json.loads(text["tags"])),
        pinned=pinned,
        created_at=float(text["created"]),
        last_used_at=float(used or 0.0),
        expires_at=expires_at,
        tenant=tenant,
        transient=text.get("transient") == b"1",  # a store of before had none
    )


def _check_quota(answer: object, limits: TenantLimits) -> None:
    if answer == b"records":
        raise quota_full("chunks", limits.records or 0)
    if answer == b"pins":
        raise quota_full("pins", limits.pinned or 0)
