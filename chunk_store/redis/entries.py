"""Entries in Redis: finding, adopting, dropping them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from chunk_store.entry import EntryHeader, EntryInfo, MissReason
from chunk_store.key import ChunkId, ChunkKey, ModelIdentity
from chunk_store.ledger import Placed
from chunk_store.redis.connection import RedisConnection
from chunk_store.redis.names import named, sid
from chunk_store.redis.scripts import entries as scripts
from chunk_store.store import DeleteReport
from chunk_store.tenant import DEFAULT_ONLY, Tenant, Tenants

STEP_ENTRIES = 500
_INFO = ("chunk", "model", "tokens", "nbytes", "created", "salt")


class RedisEntries:
    """The ``Entries`` of one Redis store."""

    def __init__(self, connection: RedisConnection) -> None:
        self._redis = connection

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

    def listed(self, chunk_ids: Sequence[ChunkId] = (), tenants: Tenants = DEFAULT_ONLY) -> list[EntryInfo]:
        wanted = set(named(self._redis, tenants))
        keys = self._keys_of(chunk_ids, wanted) if chunk_ids else self._all_keys()
        found: list[EntryInfo] = []
        for at in range(0, len(keys), STEP_ENTRIES):
            infos = self.find(keys[at : at + STEP_ENTRIES])
            found += [info for info in infos if info is not None and info.tenant in wanted]
        return sorted(found, key=lambda info: (info.last_used_at, info.key))

    def miss_reason(self, key: ChunkKey, chunk_id: ChunkId, model: ModelIdentity, tenant: Tenant) -> MissReason:
        with self._redis.errors():
            if self._redis.client.hexists(self._redis.name("buried"), key):
                return MissReason.EVICTED
        others = self.find(self._keys_of([chunk_id], {tenant}))
        differs = any(other is not None and other.key != key and other.model == model for other in others)
        return MissReason.CONTEXT_DIFFERS if differs else MissReason.NOT_STORED

    def placed(self) -> list[Placed]:
        keys = self._all_keys()
        found = []
        for at in range(0, len(keys), STEP_ENTRIES):
            found += self._locate(keys[at : at + STEP_ENTRIES])
        return found

    def locate(self, key: ChunkKey) -> Placed | None:
        return next(iter(self._locate([key])), None)

    def adopt(self, header: EntryHeader, blob: str, stored_nbytes: int) -> bool:
        return bool(self._redis.run(scripts.ADOPT, header.key, "", blob, *entry_arguments(header, stored_nbytes)))

    def forget(self, key: ChunkKey, blob: str, quarantined: bool) -> bool:
        return bool(self._redis.run(scripts.FORGET, key, blob, int(quarantined)))

    def delete_model(self, model: ModelIdentity) -> DeleteReport:
        return DeleteReport(0, *(int(count) for count in self._redis.run(scripts.DELETE_MODEL, model)))

    def _keys_of(self, chunk_ids: Sequence[ChunkId], tenants: Iterable[Tenant]) -> list[ChunkKey]:
        with self._redis.errors(), self._redis.client.pipeline(transaction=False) as pipeline:
            for tenant in tenants:
                for chunk_id in chunk_ids:
                    pipeline.smembers(self._redis.name(f"chunk:{sid(tenant, chunk_id)}"))
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


def entry_arguments(header: EntryHeader, stored_nbytes: int) -> list[str | int]:
    return [
        sid(header.tenant, header.chunk_id),
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
