"""Values in Redis: plain strings, several in flight in one pipeline."""

from __future__ import annotations

from collections.abc import Sequence

from chunk_store.blobs import BlobUnreadable, NoSpace
from chunk_store.redis_connection import RedisConnection, ServerFull
from chunk_store.store import StoreUnavailable


class RedisObjects:
    """The ``Objects`` of one Redis server."""

    kind = "redis"

    def __init__(self, connection: RedisConnection) -> None:
        self._redis = connection

    def put(self, values: Sequence[tuple[str, memoryview | bytes]]) -> None:
        try:
            with self._redis.errors(), self._redis.client.pipeline(transaction=False) as pipeline:
                for name, value in values:
                    pipeline.set(name, value)
                pipeline.execute()
        except ServerFull as error:
            raise NoSpace(str(error)) from error

    def get(self, names: Sequence[str]) -> list[memoryview | bytes | None]:
        try:
            with self._redis.errors(), self._redis.client.pipeline(transaction=False) as pipeline:
                for name in names:
                    pipeline.get(name)
                found: list[memoryview | bytes | None] = pipeline.execute()
                return found
        except StoreUnavailable as error:
            raise BlobUnreadable(str(error)) from error

    def remove(self, names: Sequence[str]) -> bool:
        with self._redis.errors():
            self._redis.client.unlink(*names)
        return True

    def close(self) -> None:
        self._redis.close()
