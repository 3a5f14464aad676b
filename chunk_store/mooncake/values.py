"""Values in Mooncake: in the memory of lenders, gone when their lender dies. Headers are metadata: in Redis."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from chunk_store.errors import BlobUnreadable, NoSpace, StoreUnavailable
from chunk_store.format.values import joined, scatter
from chunk_store.mooncake.client import NO_AVAILABLE_HANDLE, OBJECT_NOT_FOUND, REPLICA_IS_NOT_READY, pinned_config
from chunk_store.redis.connection import RedisConnection, ServerFull


class MooncakeValues:
    """The ``Values`` of one Mooncake cluster."""

    kind = "mooncake"

    def __init__(self, client: Any, metadata: RedisConnection) -> None:
        self._client = client
        self._redis = metadata
        self._config = pinned_config()

    def put(self, values: Sequence[tuple[str, Sequence[memoryview | bytes]]]) -> None:
        for name, spans in values:
            code = self._client.put(name, joined(spans), self._config)
            if code == NO_AVAILABLE_HANDLE:
                raise NoSpace("mooncake: no lender has room (or none is running)")
            if code != 0:
                raise StoreUnavailable(
                    f"mooncake: put failed with code {code}", "see whether a lender or the master is gone"
                )

    def finish(self, values: Sequence[tuple[str, Sequence[memoryview | bytes]]], header: tuple[str, bytes]) -> None:
        self.put(values)
        try:
            with self._redis.errors():
                self._redis.client.set(*header)
        except ServerFull as error:
            raise NoSpace(str(error)) from error

    def header(self, name: str) -> bytes | None:
        try:
            with self._redis.errors():
                found: bytes | None = self._redis.client.get(name)
                return found
        except StoreUnavailable as error:
            raise BlobUnreadable(str(error)) from error

    def read(
        self, header: str, names: Sequence[str], targets: Sequence[Sequence[memoryview]]
    ) -> tuple[bytes | None, list[int | None]]:
        raw = self.header(header)
        return raw, [] if raw is None else self.read_more(names, targets)

    def read_more(self, names: Sequence[str], targets: Sequence[Sequence[memoryview]]) -> list[int | None]:
        sizes: list[int | None] = []
        for name, spans in zip(names, targets, strict=True):
            value = self._get(name)
            sizes.append(None if value is None else value.nbytes)
            if value is not None:
                scatter(value, spans)
        return sizes

    def remove(self, header: str, names: Sequence[str]) -> bool:
        """Without regard to Mooncake's own leases: the ledger knows who reads. False when a writer died in the middle
        of a value, which Mooncake itself removes, but only after a time."""
        with self._redis.errors():
            self._redis.client.delete(header)
        complete = True
        for name in names:
            code = self._client.remove(name, True)
            if code == REPLICA_IS_NOT_READY:
                complete = False
            elif code not in (0, OBJECT_NOT_FOUND):
                raise StoreUnavailable(f"mooncake: remove failed with code {code}: the master does not answer")
        return complete

    def close(self) -> None:
        self._client.close()

    def _get(self, name: str) -> memoryview | None:
        """Of a dead lender nothing comes while the master still lists it: that is missing too."""
        handle = self._client.get_buffer(name)
        if handle is not None:
            return memoryview(handle).cast("B")
        size = self._client.get_size(name)
        if size < 0 and size != OBJECT_NOT_FOUND:
            raise BlobUnreadable(f"mooncake: the master does not answer (code {size})")
        return None
