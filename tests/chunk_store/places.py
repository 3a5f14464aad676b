"""The places of the backends: how to start each, open it, and break what it keeps."""

from __future__ import annotations

import shutil
from contextlib import suppress
from pathlib import Path
from typing import Any

from redis.exceptions import RedisError

from chunk_store.key import ChunkKey
from chunk_store.mooncake.client import parse_mooncake_url
from chunk_store.open import mooncake_store, open_store
from chunk_store.redis.connection import RedisConnection, parse_redis_url
from chunk_store.shared_store import SharedStore
from tests.chunk_store.contract import Damage


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

    def value(self, key: ChunkKey, part: str) -> str:
        return value_name(self.redis, key, part)

    def damage(self, key: ChunkKey, how: Damage) -> None:
        name = self.value(key, damaged_part(how))
        raw = bytearray(self.redis.client.get(name))
        self.redis.client.delete(name)
        if how is not Damage.MISSING:
            self.redis.client.set(name, damage_bytes(raw, how))

    def replace_data(self, key: ChunkKey, other: ChunkKey) -> None:
        for part in ("h", "0"):
            self.redis.client.set(self.value(key, part), self.redis.client.get(self.value(other, part)))

    def close(self) -> None:
        for store in self._stores:
            store.close()
        with suppress(RedisError):
            self.redis.client.flushdb()
        self.redis.close()


class MooncakePlace:
    """One prefix of a Mooncake cluster. All its stores use ``client``: closing a client takes a second."""

    kind = "mooncake"

    def __init__(self, url: str, client: Any) -> None:
        self._url = url
        self._stores: list[SharedStore] = []
        self._redis_url = parse_mooncake_url(url).redis_url
        self.redis = RedisConnection(parse_redis_url(self._redis_url))
        self.client = client

    def url(self) -> str:
        return self._url

    def open(self, **options: Any) -> SharedStore:
        metadata = open_store(self._redis_url, **options)
        store = mooncake_store(StaysOpen(self.client), parse_redis_url(self._redis_url), metadata.ledger)
        self._stores.append(store)
        return store

    def damage(self, key: ChunkKey, how: Damage) -> None:
        part = damaged_part(how)
        name = value_name(self.redis, key, part)
        if part == "h":
            self.redis.client.set(name, damage_bytes(bytearray(self.redis.client.get(name)), how))
            return
        raw = bytearray(self.client.get(name))
        assert self.client.remove(name, True) == 0
        if how is not Damage.MISSING:
            assert self.client.put(name, damage_bytes(raw, how)) == 0

    def replace_data(self, key: ChunkKey, other: ChunkKey) -> None:
        mine, theirs = (value_name(self.redis, which, "h") for which in (key, other))
        self.redis.client.set(mine, self.redis.client.get(theirs))
        mine, theirs = (value_name(self.redis, which, "0") for which in (key, other))
        raw = self.client.get(theirs)
        assert self.client.remove(mine, True) == 0
        assert self.client.put(mine, raw) == 0

    def close(self) -> None:
        for store in self._stores:
            store.close()
        with suppress(RedisError):
            self.redis.client.flushdb()
        self.redis.close()
        self.client.remove_all(True)


class StaysOpen:
    """A client that several stores share."""

    def __init__(self, client: Any) -> None:
        self._client = client

    def __getattr__(self, name: str) -> Any:
        return getattr(self._client, name)

    def close(self) -> None:
        """The fixture closes it."""


def value_name(redis: RedisConnection, key: ChunkKey, part: str) -> str:
    """The name of one value of an entry, found through the catalogue."""
    blobs = [name.decode() for name in redis.client.hkeys(redis.name("catalogue"))]
    (found,) = (blob for blob in blobs if blob.startswith(f"{key}."))
    return f"{redis.prefix}blob:{found}:{part}"


def damaged_part(how: Damage) -> str:
    return "0" if how in (Damage.FLIPPED_DATA, Damage.CUT, Damage.MISSING) else "h"


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
    elif how in (Damage.OLDER_VERSION, Damage.NEWER_VERSION):
        raw[8:12] = (0 if how is Damage.OLDER_VERSION else 2).to_bytes(4, "little")
    return bytes(raw)
