"""Stores on Redis and Mooncake beside the raw clients."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial

from bench.store_entries import Row, compare, entry, parts, put, put_step, tokens_of
from chunk_store.entry import EntryHeader
from chunk_store.format.values import VALUE_NBYTES
from chunk_store.mooncake.client import connect, parse_mooncake_url, pinned_config
from chunk_store.open import open_store
from chunk_store.shared_store import SharedStore
from tests.chunk_store.servers import Mooncake, Server, mooncake_url, redis_url


@contextmanager
def started(server: Server | Mooncake) -> Iterator[None]:
    server.start()
    try:
        yield
    finally:
        server.kill()


def bench_redis(server: Server, seconds: float) -> list[Row]:
    from chunk_store.redis.connection import RedisConnection, parse_redis_url

    store = open_store(redis_url(server, "bench"), capacity_nbytes=400_000_000)
    raw = RedisConnection(parse_redis_url(redis_url(server, "raw"))).client

    def raw_put(values: list[bytes]) -> None:
        with raw.pipeline(transaction=False) as pipeline:
            for number, value in enumerate(values):
                pipeline.set(f"raw{number}", value)
            pipeline.execute()

    def raw_get(values: list[bytes]) -> None:
        with raw.pipeline(transaction=False) as pipeline:
            for number in range(len(values)):
                pipeline.get(f"raw{number}")
            assert len(pipeline.execute()[0]) == len(values[0])

    rows = beside_raw("redis", store, seconds, raw_put, raw_get)
    store.close()
    return rows


def bench_mooncake(cluster: Mooncake, seconds: float) -> list[Row]:
    url = mooncake_url(cluster, "bench")
    store = open_store(url, capacity_nbytes=200_000_000)
    raw, config = connect(parse_mooncake_url(url), segment_nbytes=0), pinned_config()

    def raw_put(values: list[bytes]) -> None:
        for number, value in enumerate(values):
            raw.remove(f"raw{number}", True)
            assert raw.put(f"raw{number}", value, config) == 0

    def raw_get(values: list[bytes]) -> None:
        for number, value in enumerate(values):
            assert len(raw.get(f"raw{number}")) == len(value)

    rows = beside_raw("mooncake", store, seconds, raw_put, raw_get)
    store.close()
    raw.close()
    return rows


def beside_raw(
    name: str,
    store: SharedStore,
    seconds: float,
    raw_put: Callable[[list[bytes]], None],
    raw_get: Callable[[list[bytes]], None],
) -> list[Row]:
    """Gets and puts of a store beside the raw client's of the same bytes, as values of the size the store uses."""
    rows = []
    for mb in (2, 16):
        header = entry(tokens_of(mb))
        source, target = parts(header), parts(header)
        put(store, header, source)
        values = [os.urandom(min(VALUE_NBYTES, header.nbytes - at)) for at in range(0, header.nbytes, VALUE_NBYTES)]
        their_put, their_get = partial(raw_put, values), partial(raw_get, values)
        their_put()
        with store.lease([header.key], ttl_s=600):
            get = get_step(store, header, target)
            rows.append(compare(f"{name} get", "raw client", header, seconds, get, their_get))
        step = put_step(store, source, tokens_of(mb))
        rows.append(compare(f"{name} put", "raw client", header, seconds, step, their_put))
    return rows


def get_step(store: SharedStore, header: EntryHeader, views: Sequence[memoryview]) -> Callable[[], None]:
    def get() -> None:
        assert store.load(header.key, header.token_ids, views) is None

    return get
