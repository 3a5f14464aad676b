"""Values in the memory of a Mooncake cluster, their headers in Redis."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from chunk_store.mooncake.values import MooncakeValues
from chunk_store.redis.connection import RedisConnection, parse_redis_url
from tests.chunk_store.servers import Server, redis_url


@pytest.fixture
def values(mooncake_client: Any, shared_redis: Server) -> Iterator[MooncakeValues]:
    metadata = RedisConnection(parse_redis_url(redis_url(shared_redis)))
    yield MooncakeValues(mooncake_client, metadata)  # the client is everybody's: not closed
    metadata.close()


def test_values_and_their_header_come_and_go_together(values: MooncakeValues, tmp_path: Path) -> None:
    one, two, header = (f"{tmp_path.name}:{name}" for name in ("1", "2", "h"))
    values.put([(one, [b"first"])])
    values.finish([(two, [b"sec", b"ond"])], (header, b"about them"))
    targets = [[memoryview(bytearray(5))], [memoryview(bytearray(4)), memoryview(bytearray(2))]]
    assert values.read(header, [one, two], targets) == (b"about them", [5, 6])
    assert [bytes(span) for spans in targets for span in spans] == [b"first", b"seco", b"nd"]
    assert values.read_more([two], targets[:1]) == [6] and bytes(targets[0][0]) == b"first", "a misfit is not read"
    assert values.remove(header, [one, two, "never"])
    assert values.read(header, [one], targets[:1]) == (None, []) and values.read_more([one], targets[:1]) == [None]
