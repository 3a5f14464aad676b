"""The ledger of networked stores: Redis, one script for each step (``redis_scripts.py``).

Used for ``redis://``, where the data is in Redis too, and for ``mooncake://``, where it is not. What it survives is
what the server is configured for: with ``appendonly yes`` nothing committed is lost when the server is killed.
"""

from __future__ import annotations

import secrets
from collections.abc import Iterable, Sequence

from chunk_store import claimant
from chunk_store.blobs import Quarantined
from chunk_store.entry import EntryHeader, EntryInfo, MissReason
from chunk_store.errors import ClaimLost, StoreFull, StoreTooNew, StoreUnavailable
from chunk_store.format.header import header_nbytes
from chunk_store.format.versions import REDIS_VERSION
from chunk_store.key import ChunkId, ChunkKey, ModelIdentity
from chunk_store.ledger import (
    BUSY_RETRY_S,
    IDENTITY_BITS,
    WRITE_TTL_S,
    Claimed,
    Placed,
    ReadTicket,
    Space,
    blob_name,
    full_bytes,
    full_pins,
    full_records,
)
from chunk_store.record import ChunkRecord, RecordPage, RecordQuery
from chunk_store.redis import records as redis_records
from chunk_store.redis import scripts
from chunk_store.redis.connection import RedisConnection
from chunk_store.redis.mending import disagreements
from chunk_store.store import Busy, DeleteReport, Stored, StoreStats, SweepReport
from chunk_store.tenant import DEFAULT_ONLY, DEFAULT_TENANT, NO_LIMITS, Tenant, TenantLimits, Tenants, TenantUsage

READ_TTL_S = 30.0
STEP_ENTRIES = 500
CLAIM_ATTEMPTS_MAX = 100
_INFO = ("chunk", "model", "tokens", "nbytes", "created", "salt")


class RedisLedger:
    """See ``Ledger``. ``capacity_nbytes`` and ``records_max`` hold until ``set_limits`` sets the store's own."""

    def __init__(self, connection: RedisConnection, *, capacity_nbytes: int, records_max: int) -> None:
        self._redis = connection
        self._capacity_nbytes = capacity_nbytes
        self._records_max = records_max

    def set_limits(self, *, capacity_nbytes: int | None, records_max: int | None) -> None:
        """Changes the store's limits, for every process that uses it; None leaves one as it is.

        Before that brings an older store to this version. Raises ``StoreTooNew``, ``StoreUnavailable``.
        """
        limits = {"capacity_nbytes": capacity_nbytes, "records_max": records_max}
        given = {name: value for name, value in limits.items() if value is not None}
        with self._redis.errors():
            self._redis.client.ping()
        version = self._redis.run(scripts.UPGRADE, REDIS_VERSION)
        if version != REDIS_VERSION:
            raise StoreTooNew(
                f"the store has version {version}, this software reads up to {REDIS_VERSION}: use the newer one"
            )
        with self._redis.errors():
            if given:
                self._redis.client.hset(self._redis.name("settings"), mapping=given)

    # -- content --------------------------------------------------------------------------------------
    def put_records(self, records: Sequence[ChunkRecord], *, limits: TenantLimits = NO_LIMITS) -> list[bool]:
        if not records:
            return []
        fields = [field for record in records for field in redis_records.arguments(record)]
        most = (_number(limits.records), _number(limits.pinned))
        added = self._redis.run(scripts.PUT_RECORDS, self._records_max, *most, *fields)
        if added == b"full":
            raise StoreFull("the registry is full: delete chunks or raise records_max")
        _check_quota(added, limits)
        return [bool(new) for new in added]

    def get_records(self, chunk_ids: Sequence[ChunkId], tenants: Tenants = DEFAULT_ONLY) -> list[ChunkRecord | None]:
        return redis_records.get(self._redis, chunk_ids, tenants)

    def list_records(self, query: RecordQuery) -> RecordPage:
        return redis_records.page(self._redis, query)

    def set_pinned(
        self,
        chunk_ids: Sequence[ChunkId],
        pinned: bool,
        tenant: Tenant = DEFAULT_TENANT,
        *,
        limits: TenantLimits = NO_LIMITS,
    ) -> list[bool]:
        answer = self._redis.run(scripts.SET_PINNED, int(pinned), tenant, _number(limits.pinned), *chunk_ids)
        _check_quota(answer, limits)
        return [bool(known) for known in answer]

    # -- entries --------------------------------------------------------------------------------------
    def find(self, keys: Sequence[ChunkKey]) -> list[EntryInfo | None]:
        with self._redis.errors(), self._redis.client.pipeline(transaction=False) as pipeline:
            for key in keys:
                pipeline.hmget(self._redis.name(f"entry:{key}"), *_INFO)
            if keys:
                pipeline.zmscore(self._redis.name("used"), list(keys))
                pipeline.smismember(self._redis.name("doomed"), list(keys))
            answers = pipeline.execute()
        if not keys:
            return []
        *found, used, doomed = answers
        return [
            None if fields[0] is None or gone or at is None else _info(key, fields, at)
            for key, fields, at, gone in zip(keys, found, used, doomed, strict=True)
        ]

    def list_entries(self, chunk_ids: Sequence[ChunkId], tenants: Tenants = DEFAULT_ONLY) -> list[EntryInfo]:
        owners = set(redis_records.named(self._redis, tenants))
        keys = self._keys_of(chunk_ids, owners) if chunk_ids else self._all_keys()
        found: list[EntryInfo] = []
        for at in range(0, len(keys), STEP_ENTRIES):
            infos = self.find(keys[at : at + STEP_ENTRIES])
            found += [info for info in infos if info is not None and info.tenant in owners]
        return sorted(found, key=lambda info: (info.last_used_at, info.key))

    def miss_reason(self, key: ChunkKey, chunk_id: ChunkId, model: ModelIdentity, tenant: Tenant) -> MissReason:
        with self._redis.errors():
            if self._redis.client.hexists(self._redis.name("buried"), key):
                return MissReason.EVICTED
        others = self.find(self._keys_of([chunk_id], {tenant}))
        differs = any(other is not None and other.key != key and other.model == model for other in others)
        return MissReason.CONTEXT_DIFFERS if differs else MissReason.NOT_STORED

    def begin_read(self, key: ChunkKey) -> ReadTicket | MissReason:
        token = f"read-{secrets.token_hex(8)}"
        there, answer = self._redis.run(scripts.BEGIN_READ, key, token, READ_TTL_S)
        if not there:
            return MissReason[answer.decode()]
        return ReadTicket(key, answer.decode(), token)

    def end_read(self, ticket: ReadTicket) -> None:
        self._redis.run(scripts.UNHOLD, ticket.token, ticket.key)

    def forget(self, key: ChunkKey, blob: str, quarantined: bool) -> bool:
        return bool(self._redis.run(scripts.FORGET, key, blob, int(quarantined)))

    # -- claims ---------------------------------------------------------------------------------------
    def claim(self, key: ChunkKey, nonce: str, ttl_s: float) -> Claimed | Stored | Busy:
        for _ in range(CLAIM_ATTEMPTS_MAX):
            answer = self._redis.run(scripts.CLAIM, key, nonce, claimant.this_claimant(), ttl_s)
            if answer[0] == b"claimed":
                return Claimed()
            if answer[0] == b"stored":
                info = self.find([key])[0]
                if info is not None:
                    return Stored(info)
            elif claimant.is_dead(answer[2].decode()):
                self._redis.run(scripts.DROP_CLAIM, key, answer[3])
            else:
                return Busy(min(BUSY_RETRY_S, float(answer[1])))
        raise StoreUnavailable(
            f"the entry of {key} is there and in no list: the store is damaged; run `cairn store verify --repair`"
        )

    def renew_claim(self, key: ChunkKey, nonce: str, ttl_s: float) -> None:
        _check_claim(key, bool(self._redis.run(scripts.RENEW_CLAIM, key, nonce, ttl_s)))

    def reserve(self, key: ChunkKey, nonce: str, space: Space, removed: Sequence[str]) -> list[str]:
        nbytes, most = space.nbytes, space.tenant_nbytes_max
        fixed = (key, nonce, nbytes, WRITE_TTL_S, self._capacity_nbytes, space.tenant, _number(most))
        outcome, *rest = [part.decode() for part in self._redis.run(scripts.RESERVE, *fixed, *removed)]
        _check_claim(key, outcome != "lost")
        if outcome == "quota":
            raise full_bytes(most or 0)
        if outcome == "large":
            raise StoreFull(f"an entry of {nbytes} bytes is larger than the store's capacity of {rest[0]}")
        if outcome == "full":
            raise StoreFull(f"no room for {nbytes} bytes: the rest is pinned, leased or being written")
        return rest

    def evict(self, nbytes: int) -> list[str]:
        return [blob.decode() for blob in self._redis.run(scripts.EVICT, nbytes)]

    def commit(self, key: ChunkKey, nonce: str, header: EntryHeader) -> EntryInfo:
        times = self._redis.run(scripts.COMMIT, key, nonce, blob_name(key, nonce), *_entry_arguments(header))
        _check_claim(key, bool(times))
        created_at, last_used_at = (float(at) for at in times)
        tokens = len(header.token_ids)
        sizes = (tokens, header.nbytes, created_at, last_used_at)
        return EntryInfo(key, header.chunk_id, header.model, *sizes, header.tenant)

    def drop_claim(self, key: ChunkKey, nonce: str) -> bool:
        return bool(self._redis.run(scripts.DROP_CLAIM, key, nonce))

    # -- leases ---------------------------------------------------------------------------------------
    def hold(self, lease: str, keys: Sequence[ChunkKey], ttl_s: float, wait_s: float | None = None) -> None:
        self._redis.run(scripts.HOLD, lease, ttl_s, *keys)

    def unhold(self, lease: str, keys: Sequence[ChunkKey], wait_s: float | None = None) -> None:
        self._redis.run(scripts.UNHOLD, lease, *keys)

    # -- removal and upkeep ---------------------------------------------------------------------------
    def delete_chunks(self, chunk_ids: Sequence[ChunkId], tenants: Tenants = DEFAULT_ONLY) -> DeleteReport:
        places = [(tenant, name) for tenant in redis_records.named(self._redis, tenants) for name in chunk_ids]
        sids = [redis_records.sid(tenant, name) for tenant, name in places]
        return DeleteReport(*(int(count) for count in self._redis.run(scripts.DELETE_CHUNKS, *sids)))

    def delete_model(self, model: ModelIdentity) -> DeleteReport:
        return DeleteReport(0, *(int(count) for count in self._redis.run(scripts.DELETE_MODEL, model)))

    def sweep(self, quarantined: Sequence[Quarantined] = ()) -> SweepReport:
        """On a server nothing is kept of bad data."""
        broken = 0
        for key, nonce, holder in self._claims():
            if claimant.is_dead(holder):
                broken += int(self._redis.run(scripts.DROP_CLAIM, key, nonce))
        claims, *rest = (int(count) for count in self._redis.run(scripts.SWEEP, self._capacity_nbytes))
        return SweepReport(claims + broken, *rest)

    def garbage(self) -> list[str]:
        with self._redis.errors():
            return [blob.decode() for blob in self._redis.client.hkeys(self._redis.name("garbage"))]

    def discard(self, blobs: Sequence[str]) -> None:
        if blobs:
            self._redis.run(scripts.DISCARD, *blobs)

    def placed(self) -> list[Placed]:
        keys = self._all_keys()
        found = []
        for at in range(0, len(keys), STEP_ENTRIES):
            found += self._locate(keys[at : at + STEP_ENTRIES])
        return found

    def locate(self, key: ChunkKey) -> Placed | None:
        return next(iter(self._locate([key])), None)

    def unfinished(self) -> list[str]:
        return [blob_name(key, nonce) for key, nonce, _ in self._claims()]

    def adopt(self, header: EntryHeader, blob: str) -> bool:
        return bool(self._redis.run(scripts.ADOPT, header.key, "", blob, *_entry_arguments(header)))

    def audit(self) -> list[str]:
        wrong = [part.decode() for part in self._redis.run(scripts.RECOUNT, 0)]
        triples = zip(wrong[::3], wrong[1::3], wrong[2::3], strict=True)
        problems = [f"total {name} is {stored}, the rows say {counted}" for name, stored, counted in triples]
        lists = disagreements(self._redis, correct=False)
        return problems + ([f"rows and lists disagree in {lists} places"] if lists else [])

    def recount(self) -> None:
        disagreements(self._redis, correct=True)
        self._redis.run(scripts.RECOUNT, 1)

    def identity(self) -> str:
        name = self._redis.name("totals")
        with self._redis.errors():
            number = self._redis.client.hget(name, "identity")
            if number is None:  # of several processes one draws
                self._redis.client.hsetnx(name, "identity", secrets.randbits(IDENTITY_BITS))
                number = self._redis.client.hget(name, "identity")
        return f"{int(number or 0):016x}"

    def stats(self, backend: str) -> StoreStats:
        with self._redis.errors(), self._redis.client.pipeline(transaction=False) as pipeline:
            pipeline.hgetall(self._redis.name("totals"))
            pipeline.hgetall(self._redis.name("settings"))
            totals, settings = (
                {name.decode(): int(value) for name, value in part.items()} for part in pipeline.execute()
            )
        pinned, leased = self._redis.run(scripts.COUNTS)
        space = ("entry_nbytes", "claim_nbytes", "garbage_nbytes")
        return StoreStats(
            backend=backend,
            records=totals.get("records", 0),
            records_max=settings.get("records_max", self._records_max),
            entries=totals.get("entries", 0),
            nbytes=sum(totals.get(name, 0) for name in space),
            capacity_nbytes=settings.get("capacity_nbytes", self._capacity_nbytes),
            pinned_entries=pinned,
            leased_entries=leased,
            evictions=totals.get("evictions", 0),
            quarantined=totals.get("quarantined", 0),
        )

    def tenants(self) -> list[Tenant]:
        return list(redis_records.named(self._redis, None))

    def usage(self, tenant: Tenant) -> TenantUsage:
        fields = [f"entries@{tenant}", f"entry_nbytes@{tenant}"]
        with self._redis.errors(), self._redis.client.pipeline(transaction=False) as pipeline:
            pipeline.hmget(self._redis.name("totals"), fields)
            pipeline.zcard(redis_records.index_name(self._redis, tenant, "records_created"))
            pipeline.scard(redis_records.index_name(self._redis, tenant, "pinned"))
            counts, records, pinned = pipeline.execute()
        entries, nbytes = (int(count or 0) for count in counts)
        pinned_entries, leased = self._redis.run(scripts.COUNTS, tenant)
        return TenantUsage(records, pinned, entries, nbytes, pinned_entries, leased)

    def close(self) -> None:
        self._redis.close()

    def _keys_of(self, chunk_ids: Sequence[ChunkId], tenants: Iterable[Tenant]) -> list[ChunkKey]:
        with self._redis.errors(), self._redis.client.pipeline(transaction=False) as pipeline:
            for tenant in tenants:
                for chunk_id in chunk_ids:
                    pipeline.smembers(self._redis.name(f"chunk:{redis_records.sid(tenant, chunk_id)}"))
            return [ChunkKey(key.decode()) for members in pipeline.execute() for key in members]

    def _all_keys(self) -> list[ChunkKey]:
        with self._redis.errors():
            return [ChunkKey(key.decode()) for key in self._redis.client.zrange(self._redis.name("used"), 0, -1)]

    def _locate(self, keys: Sequence[ChunkKey]) -> list[Placed]:
        with self._redis.errors(), self._redis.client.pipeline(transaction=False) as pipeline:
            for key in keys:
                pipeline.hmget(self._redis.name(f"entry:{key}"), "blob", "stored")
            found = zip(keys, pipeline.execute(), strict=True)
        return [Placed(key, blob.decode(), int(stored)) for key, (blob, stored) in found if blob is not None]

    def _claims(self) -> list[tuple[ChunkKey, str, str]]:
        """Key, nonce and owner of each claim."""
        with self._redis.errors():
            keys = [key.decode() for key in self._redis.client.zrange(self._redis.name("claims"), 0, -1)]
            with self._redis.client.pipeline(transaction=False) as pipeline:
                for key in keys:
                    pipeline.hmget(self._redis.name(f"claim:{key}"), "nonce", "owner")
                found = zip(keys, pipeline.execute(), strict=True)
        return [(ChunkKey(key), nonce.decode(), holder.decode()) for key, (nonce, holder) in found if nonce]


def _entry_arguments(header: EntryHeader) -> list[str | int]:
    stored_nbytes = header_nbytes(header) + header.nbytes
    return [
        redis_records.sid(header.tenant, header.chunk_id),
        header.model,
        header.tenant,
        len(header.token_ids),
        header.nbytes,
        stored_nbytes,
        *header.context,
    ]


def _info(key: ChunkKey, fields: list[bytes], used: float) -> EntryInfo:
    chunk, model, tokens, nbytes, created, tenant = (field.decode() for field in fields)
    chunk_id = ChunkId(chunk.rpartition("/")[2])
    sizes = (int(tokens), int(nbytes), float(created), used)
    return EntryInfo(key, chunk_id, ModelIdentity(model), *sizes, Tenant(tenant))


def _number(limit: int | None) -> str:
    """A limit as scripts take it."""
    return "" if limit is None else str(limit)


def _check_quota(answer: object, limits: TenantLimits) -> None:
    if answer == b"records":
        raise full_records(limits.records or 0)
    if answer == b"pins":
        raise full_pins(limits.pinned or 0)


def _check_claim(key: ChunkKey, held: bool) -> None:
    if not held:
        raise ClaimLost(f"the claim on {key} expired and was taken or swept; begin again")
