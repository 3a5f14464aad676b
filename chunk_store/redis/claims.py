"""Claims in Redis: who writes which key, and the space that is reserved for it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from chunk_store.claimant import is_dead, this_claimant
from chunk_store.entry import EntryHeader, EntryInfo
from chunk_store.errors import StoreUnavailable
from chunk_store.format.header import header_nbytes
from chunk_store.key import ChunkKey
from chunk_store.ledger import BUSY_RETRY_S, WRITE_TTL_S, Entries, blob_name, claim_lost
from chunk_store.limits import Space, no_room, quota_full, too_large
from chunk_store.redis.connection import RedisConnection
from chunk_store.redis.entries import entry_arguments
from chunk_store.redis.names import number
from chunk_store.redis.scripts import claims as scripts
from chunk_store.store import Busy, Stored

CLAIM_ATTEMPTS_MAX = 100
RENEWED_AT_ONCE = 256


class RedisClaims:
    """The ``Claims`` of one Redis store."""

    def __init__(self, connection: RedisConnection, entries: Entries, defaults: Mapping[str, int]) -> None:
        self._redis = connection
        self._entries = entries
        self._defaults = defaults

    def claim(self, key: ChunkKey, nonce: str, ttl_s: float) -> Stored | Busy | None:
        for _ in range(CLAIM_ATTEMPTS_MAX):
            answer = self._redis.run(scripts.CLAIM, key, nonce, this_claimant(), ttl_s)
            if answer[0] == b"claimed":
                return None
            if answer[0] == b"stored":
                info = self._entries.find([key])[0]
                if info is not None:
                    return Stored(info)
            elif is_dead(answer[2].decode()):
                self._redis.run(scripts.DROP_CLAIM, key, answer[3])
            else:
                return Busy(min(BUSY_RETRY_S, float(answer[1])))
        raise StoreUnavailable(
            f"the entry of {key} is there and in no list: the store is damaged", "run `cairn store verify --repair`"
        )

    def renew(self, held: Sequence[tuple[ChunkKey, str]], ttl_s: float) -> list[bool]:
        still: list[bool] = []
        for first in range(0, len(held), RENEWED_AT_ONCE):  # a script keeps everybody else waiting
            named = [part for claim in held[first : first + RENEWED_AT_ONCE] for part in claim]
            still += map(bool, self._redis.run(scripts.RENEW_CLAIMS, ttl_s, *named))
        return still

    def reserve(self, key: ChunkKey, nonce: str, space: Space, removed: Sequence[str]) -> list[str]:
        nbytes, most, capacity = space.nbytes, space.tenant_nbytes_max, self._defaults["capacity_nbytes"]
        fixed = (key, nonce, nbytes, WRITE_TTL_S, capacity, space.tenant, number(most))
        outcome, *rest = [part.decode() for part in self._redis.run(scripts.RESERVE, *fixed, *removed)]
        _check_claim(key, outcome != "lost")
        if outcome == "quota":
            raise quota_full("bytes", most or 0)
        if outcome == "large":
            raise too_large(nbytes, int(rest[0]))
        if outcome == "full":
            raise no_room(nbytes)
        return rest

    def evict(self, nbytes: int) -> list[str]:
        return [blob.decode() for blob in self._redis.run(scripts.EVICT, nbytes)]

    def commit(self, key: ChunkKey, nonce: str, header: EntryHeader) -> EntryInfo:
        arguments = entry_arguments(header, header_nbytes(header) + header.nbytes)
        times = self._redis.run(scripts.COMMIT, key, nonce, blob_name(key, nonce), *arguments)
        _check_claim(key, bool(times))
        created_at, last_used_at = (float(at) for at in times)
        tokens = len(header.token_ids)
        sizes = (tokens, header.nbytes, created_at, last_used_at)
        return EntryInfo(key, header.chunk_id, header.model, *sizes, header.tenant)

    def drop(self, key: ChunkKey, nonce: str) -> bool:
        return bool(self._redis.run(scripts.DROP_CLAIM, key, nonce))

    def unfinished(self) -> list[str]:
        return [blob_name(key, nonce) for key, nonce, _ in self.held()]

    def held(self) -> list[tuple[ChunkKey, str, str]]:
        """Key, nonce and claimant of each claim."""
        with self._redis.errors():
            keys = [key.decode() for key in self._redis.client.zrange(self._redis.name("claims"), 0, -1)]
            with self._redis.client.pipeline(transaction=False) as pipeline:
                for key in keys:
                    pipeline.hmget(self._redis.name(f"claim:{key}"), "nonce", "owner")
                found = zip(keys, pipeline.execute(), strict=True)
        return [(ChunkKey(key), nonce.decode(), holder.decode()) for key, (nonce, holder) in found if nonce]


def _check_claim(key: ChunkKey, held: bool) -> None:
    if not held:
        raise claim_lost(key)
