"""What a service says of its health, for threads and for event loops."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import grpc
import pytest
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from cairn.client.health import ask_health, ask_health_async
from cairn.client.transport import Peer

Status = health_pb2.HealthCheckResponse


def asked(address: str) -> tuple[str, str]:
    """What both kinds of channel are told."""
    peer = Peer("health", address)

    async def main() -> tuple[str, str]:
        async with peer.open_async_channel() as channel:
            return await ask_health_async(channel, peer, 10.0)

    with peer.open_channel() as channel:
        told = ask_health(channel, peer, 10.0)
    assert asyncio.run(main())[0] == told[0]
    return told


@pytest.fixture
def server() -> Iterator[tuple[grpc.Server, str]]:
    made = grpc.server(ThreadPoolExecutor(2))
    port = made.add_insecure_port("127.0.0.1:0")
    yield made, f"127.0.0.1:{port}"
    made.stop(None)


def test_a_service_serves_or_not(server: tuple[grpc.Server, str]) -> None:
    servicer = health.HealthServicer()
    health_pb2_grpc.add_HealthServicer_to_server(servicer, server[0])
    server[0].start()
    servicer.set("", Status.NOT_SERVING)
    assert asked(server[1]) == ("NOT_SERVING", "")
    servicer.set("", Status.SERVING)
    assert asked(server[1]) == ("SERVING", "")


def test_one_without_health_and_one_that_is_not_there(server: tuple[grpc.Server, str]) -> None:
    server[0].start()
    assert asked(server[1])[0] == "UNIMPLEMENTED"
    code, why = asked("127.0.0.1:9")
    assert code == "UNAVAILABLE" and why
