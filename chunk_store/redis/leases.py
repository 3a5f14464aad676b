"""Leases in Redis. A reader has one, too: values, unlike open files, vanish when they are deleted."""

from __future__ import annotations

import secrets
from collections.abc import Sequence

from chunk_store.entry import MissReason
from chunk_store.key import ChunkKey
from chunk_store.ledger import ReadTicket
from chunk_store.redis.connection import RedisConnection
from chunk_store.redis.scripts import leases as scripts

READ_TTL_S = 30.0


class RedisLeases:
    """The ``Leases`` of one Redis store. ``wait_s`` is the connection's."""

    def __init__(self, connection: RedisConnection) -> None:
        self._redis = connection

    def hold(self, lease: str, keys: Sequence[ChunkKey], ttl_s: float, wait_s: float | None = None) -> None:
        self._redis.run(scripts.HOLD, lease, ttl_s, *keys)

    def end(self, lease: str, keys: Sequence[ChunkKey], wait_s: float | None = None) -> None:
        self._redis.run(scripts.UNHOLD, lease, *keys)

    def begin_read(self, key: ChunkKey) -> ReadTicket | MissReason:
        token = f"read-{secrets.token_hex(8)}"
        there, answer = self._redis.run(scripts.BEGIN_READ, key, token, READ_TTL_S)
        if not there:
            return MissReason[answer.decode()]
        return ReadTicket(key, answer.decode(), token)

    def end_read(self, ticket: ReadTicket) -> None:
        self._redis.run(scripts.UNHOLD, ticket.token, ticket.key)
