"""Values on a Redis server: what is full, away or missing is told apart."""

from __future__ import annotations

from pathlib import Path

import pytest

from cairn.local.processes import free_port
from chunk_store.errors import BlobUnreadable, NoSpace, StoreUnavailable
from chunk_store.redis.connection import RedisConnection, parse_redis_url
from tests.chunk_store.redis.test_wire import values_at
from tests.chunk_store.servers import Server, need_redis, redis_server, redis_url


def test_values_and_their_header_come_and_go_together(shared_redis: Server, tmp_path: Path) -> None:
    values = values_at(redis_url(shared_redis))
    one, two, header = (f"{tmp_path.name}:{name}" for name in ("1", "2", "h"))
    values.put([(one, [b"first"])])
    values.finish([(two, [b"sec", b"ond"])], (header, b"about them"))
    targets = [[memoryview(bytearray(5))], [memoryview(bytearray(6))]]
    assert values.read(header, [one, two], targets) == (b"about them", [5, 6])
    assert values.header(header) == b"about them" and bytes(targets[1][0]) == b"second"
    assert values.remove(header, [one, two, "never"])
    assert values.read(header, [one], targets[:1]) == (None, [None])
    values.close()


def test_a_server_without_memory_has_no_space(tmp_path: Path) -> None:
    need_redis()
    server = redis_server(tmp_path, "--maxmemory", "3mb", "--maxmemory-policy", "noeviction")
    server.start()
    values = values_at(redis_url(server))
    with pytest.raises(NoSpace, match="OOM"):
        for number in range(8):
            values.put([(f"v{number}", [bytes(2**20)])])
    server.kill()
    with pytest.raises(BlobUnreadable):
        values.header("v0")
    with pytest.raises(StoreUnavailable):
        values.put([("v", [b"1"])])
    values.close()


def test_a_server_that_is_not_there_is_named() -> None:
    port = free_port("127.0.0.1")
    values = values_at(f"redis://127.0.0.1:{port}")
    with pytest.raises(BlobUnreadable, match=f"redis at 127.0.0.1:{port}"):
        values.read_more(["x"], [[memoryview(bytearray(1))]])
    connection = RedisConnection(parse_redis_url(f"redis://127.0.0.1:{port}"))
    with pytest.raises(StoreUnavailable, match=f"redis at 127.0.0.1:{port}"), connection.errors():
        connection.client.ping()
