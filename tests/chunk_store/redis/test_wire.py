"""The part of the Redis protocol that is ours: scatter and gather of large values."""

from __future__ import annotations

import random
import threading
from collections.abc import Iterator

import pytest

from chunk_store.redis.connection import RedisConnection, parse_redis_url
from chunk_store.redis.values import RedisValues
from chunk_store.redis.wire import SPANS_PER_CALL, RedisWire
from tests.chunk_store.servers import Server, redis_url, tls_url


@pytest.fixture(params=["plain", "tls"])
def url(request: pytest.FixtureRequest) -> str:
    if request.param == "plain":
        return redis_url(request.getfixturevalue("shared_redis"), "wire")
    return tls_url(request.getfixturevalue("shared_tls_redis"), "wire")


@pytest.fixture
def wire(url: str) -> Iterator[RedisValues]:
    opened = values_at(url)
    yield opened
    opened.close()


def values_at(url: str) -> RedisValues:
    address = parse_redis_url(url)
    return RedisValues(RedisConnection(address), RedisWire(address))


def cut(raw: bytes, sizes: list[int]) -> list[memoryview]:
    at, spans = 0, []
    for size in sizes:
        spans.append(memoryview(raw)[at : at + size])
        at += size
    assert at == len(raw)
    return spans


@pytest.mark.parametrize("sizes", [[0], [1], [3_000_000], [5, 0, 70_000, 1], [11] * (SPANS_PER_CALL + 3)])
def test_values_go_and_come_in_parts(wire: RedisValues, url: str, sizes: list[int]) -> None:
    raw = random.Random(1).randbytes(sum(sizes))
    client = RedisConnection(parse_redis_url(url)).client
    wire.put([("a", cut(raw, sizes)), ("b", [b"x", b"yz"])])
    assert client.get("a") == raw, "the ordinary client sees the same value"
    assert client.get("b") == b"xyz"
    targets = [[memoryview(bytearray(size)) for size in sizes], [memoryview(bytearray(3))]]
    header, found = wire.read("b", ["a", "b"], targets)
    assert (header, found) == (b"xyz", [len(raw), 3])
    assert b"".join(targets[0]) == raw and bytes(targets[1][0]) == b"xyz"


def test_missing_and_misfitting_values_do_not_disturb_their_neighbours(wire: RedisValues) -> None:
    wire.put([("right", [b"12345678"]), ("long", [b"123456789"])])
    target = [[memoryview(bytearray(8))] for _ in range(4)]
    found = wire.read_more(["long", "nobody", "right", "long"], target)
    assert found == [9, None, 8, 9]
    assert [bytes(spans[0]) for spans in target] == [bytes(8), bytes(8), b"12345678", bytes(8)]
    assert wire.header("nobody") is None
    assert wire.read("nobody", [], []) == (None, [])


def test_threads_share_a_wire(wire: RedisValues) -> None:
    wrong: list[int] = []

    def work(number: int) -> None:
        raw = bytes([number]) * 200_000
        for _ in range(10):
            wire.put([(f"t{number}", [raw])])
            target = memoryview(bytearray(len(raw)))
            if wire.read_more([f"t{number}"], [[target]]) != [len(raw)] or target != raw:
                wrong.append(number)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert not any(thread.is_alive() for thread in threads)
    assert wrong == []


def test_an_idle_connection_that_the_server_closed_is_replaced(shared_redis: Server) -> None:
    url = redis_url(shared_redis, "wire")
    wire = values_at(url)
    wire.put([("idle", [b"1"])])
    RedisConnection(parse_redis_url(url)).client.client_kill_filter(_type="normal", skipme=True)
    assert wire.header("idle") == b"1"
    wire.close()
