"""Values in Redis: plain strings, several in flight, moved without copies (``wire.py``)."""

from __future__ import annotations

from collections.abc import Sequence

from chunk_store.errors import BlobUnreadable, NoSpace, StoreUnavailable
from chunk_store.redis.connection import RedisConnection, ServerFull
from chunk_store.redis.wire import RedisWire


class RedisValues:
    """The ``Values`` of one Redis server."""

    kind = "redis"

    def __init__(self, connection: RedisConnection, wire: RedisWire) -> None:
        self._redis = connection
        self._wire = wire

    def put(self, values: Sequence[tuple[str, Sequence[memoryview | bytes]]]) -> None:
        try:
            self._wire.run(lambda socket: socket.set(values))
        except ServerFull as error:
            raise NoSpace(str(error)) from error

    def finish(self, values: Sequence[tuple[str, Sequence[memoryview | bytes]]], header: tuple[str, bytes]) -> None:
        name, raw = header
        self.put([*values, (name, [raw])])

    def header(self, name: str) -> bytes | None:
        return self._get(name, [], [])[0]

    def read(
        self, header: str, names: Sequence[str], targets: Sequence[Sequence[memoryview]]
    ) -> tuple[bytes | None, list[int | None]]:
        return self._get(header, names, targets)

    def read_more(self, names: Sequence[str], targets: Sequence[Sequence[memoryview]]) -> list[int | None]:
        return self._get(None, names, targets)[1]

    def remove(self, header: str, names: Sequence[str]) -> bool:
        with self._redis.errors():
            self._redis.client.unlink(header, *names)
        return True

    def close(self) -> None:
        self._wire.close()
        self._redis.close()

    def _get(
        self, header: str | None, names: Sequence[str], targets: Sequence[Sequence[memoryview]]
    ) -> tuple[bytes | None, list[int | None]]:
        try:
            return self._wire.run(lambda socket: socket.get(header, names, targets))
        except StoreUnavailable as error:
            raise BlobUnreadable(str(error)) from error
