"""Blobs on a server of values: listed in a catalogue, found without it, removed whole."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing

import pytest

from chunk_store.blobs import Expected
from chunk_store.errors import BlobBad, BlobMissing
from chunk_store.landing import Buffers
from chunk_store.layout import KVLayout, LayerLayout
from chunk_store.redis.blobs import ValueBlobs
from chunk_store.redis.connection import RedisConnection, parse_redis_url
from tests.chunk_store.contract import Sample, blank, sample, views_of
from tests.chunk_store.redis.test_wire import values_at
from tests.chunk_store.servers import Server, redis_url

SMALL = sample(1)
LARGE = sample(2, tokens=1200, layout=KVLayout("float32", (LayerLayout(8, 128, 128),) * 2))  # of ten values


@pytest.fixture
def blobs(shared_redis: Server, connection: RedisConnection) -> Iterator[ValueBlobs]:
    prefix = connection.prefix.removesuffix(":")
    with closing(ValueBlobs(values_at(redis_url(shared_redis)), _at(shared_redis, prefix))) as opened:
        yield opened


def _at(server: Server, prefix: str) -> RedisConnection:
    return RedisConnection(parse_redis_url(redis_url(server, prefix)))


def write(blobs: ValueBlobs, entry: Sample) -> str:
    name = f"{entry.key}.one"
    blobs.write(name, entry.header, entry.views)
    return name


@pytest.mark.parametrize("entry", [SMALL, LARGE])
def test_what_is_written_is_read_and_removed_whole(
    blobs: ValueBlobs, connection: RedisConnection, entry: Sample
) -> None:
    name, target = write(blobs, entry), blank(entry)
    frame = blobs.frame(name)
    assert frame.header == entry.header and list(blobs.names()) == [(name, frame.stored_nbytes)]
    blobs.read(name, Expected(entry.key, entry.header.token_ids), Buffers(views_of(target)))
    assert tuple(map(bytes, target)) == entry.data
    assert blobs.remove([name, "never"]) == [name, "never"] and blobs.remove([]) == []
    assert list(connection.client.scan_iter(match=f"{connection.prefix}*")) == []
    with pytest.raises(BlobMissing):
        blobs.frame(name)


def test_what_the_catalogue_has_lost_is_found_by_its_header(blobs: ValueBlobs, connection: RedisConnection) -> None:
    name = write(blobs, LARGE)
    connection.client.delete(connection.name("catalogue"))
    assert list(blobs.names()) == [(name, blobs.frame(name).stored_nbytes)]
    assert blobs.remove([name]) == [name]
    assert list(connection.client.scan_iter(match=f"{connection.prefix}*")) == []


def test_a_value_that_is_gone_or_changed_is_told_apart(blobs: ValueBlobs, connection: RedisConnection) -> None:
    name, expected = write(blobs, LARGE), Expected(LARGE.key, LARGE.header.token_ids)
    last = f"{connection.prefix}blob:{name}:9"
    value = connection.client.get(last)
    connection.client.set(last, value[:-1] + bytes([value[-1] ^ 1]))
    with pytest.raises(BlobBad, match="checksum"):
        blobs.read(name, expected, Buffers(views_of(blank(LARGE))))
    connection.client.delete(last)
    with pytest.raises(BlobMissing):
        blobs.read(name, expected, Buffers(views_of(blank(LARGE))))
    assert "not kept" in blobs.quarantine(name) and blobs.quarantined() == []
