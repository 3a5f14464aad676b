"""The places of the backends: how to start each, open it, and break what it keeps."""

from __future__ import annotations

import shutil
from contextlib import suppress
from pathlib import Path
from typing import Any

from contract import Damage
from redis.exceptions import RedisError

from chunk_store.key import ChunkKey
from chunk_store.open import open_store
from chunk_store.redis_connection import RedisConnection, parse_redis_url
from chunk_store.shared_store import SharedStore


class FilePlace:
    """A directory."""

    kind = "file"

    def __init__(self, root: Path) -> None:
        self.root = root
        self._stores: list[SharedStore] = []

    def url(self) -> str:
        return f"file://{self.root}"

    def open(self, **options: Any) -> SharedStore:
        store = open_store(self.url(), **options)
        self._stores.append(store)
        return store

    def file(self, key: ChunkKey) -> Path:
        (found,) = (self.root / "data" / key[:2]).glob(f"{key}.*")
        return found

    def damage(self, key: ChunkKey, how: Damage) -> None:
        damage_file(self.file(key), how)

    def replace_data(self, key: ChunkKey, other: ChunkKey) -> None:
        shutil.copyfile(self.file(other), self.file(key))

    def close(self) -> None:
        for store in self._stores:
            store.close()


class RedisPlace:
    """One prefix of a Redis server, plain or with TLS."""

    kind = "redis"

    def __init__(self, url: str) -> None:
        self._url = url
        self._stores: list[SharedStore] = []
        self.redis = RedisConnection(parse_redis_url(url))

    def url(self) -> str:
        return self._url

    def open(self, **options: Any) -> SharedStore:
        store = open_store(self._url, **options)
        self._stores.append(store)
        return store

    def blob(self, key: ChunkKey) -> str:
        (found,) = self.redis.client.keys(self.redis.name(f"blob:{key}.*"))
        return str(found.decode())

    def damage(self, key: ChunkKey, how: Damage) -> None:
        blob = self.blob(key)
        if how is Damage.MISSING:
            self.redis.client.delete(blob)
            return
        field = "0" if how in (Damage.FLIPPED_DATA, Damage.CUT) else "h"
        raw = bytearray(self.redis.client.hget(blob, field))
        self.redis.client.hset(blob, field, damage_bytes(raw, how))

    def replace_data(self, key: ChunkKey, other: ChunkKey) -> None:
        self.redis.client.hset(self.blob(key), mapping=self.redis.client.hgetall(self.blob(other)))

    def close(self) -> None:
        for store in self._stores:
            store.close()
        with suppress(RedisError):
            self.redis.client.flushdb()
        self.redis.close()


def damage_file(path: Path, how: Damage) -> None:
    raw = bytearray(path.read_bytes())
    if how is Damage.MISSING:
        path.unlink()
    else:
        path.write_bytes(damage_bytes(raw, how))


def damage_bytes(raw: bytearray, how: Damage) -> bytes:
    if how is Damage.FLIPPED_DATA:
        raw[-1] ^= 1
    elif how is Damage.FLIPPED_HEADER:
        raw[40] ^= 1
    elif how is Damage.CUT:
        del raw[-3:]
    elif how is Damage.FOREIGN:
        raw[:8] = b"\x80\x04pickle"
    elif how is Damage.NEWER_VERSION:
        raw[8:12] = (2).to_bytes(4, "little")
    return bytes(raw)
