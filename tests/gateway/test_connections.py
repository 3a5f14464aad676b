"""Connections that ask nothing, or too slowly, end."""

from __future__ import annotations

import asyncio
import socket

import pytest
import uvicorn
from starlette.types import Receive, Scope, Send

from gateway import connections
from gateway.connections import STATE, BoundedProtocol, Connections
from gateway.metrics import GatewayMetrics


async def app(scope: Scope, receive: Receive, send: Send) -> None:
    assert scope["type"] == "http"
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"2")]})
    await send({"type": "http.response.body", "body": b"ok"})


async def listening(port: socket.socket) -> tuple[uvicorn.Server, asyncio.Task[None]]:
    among = Connections(8, GatewayMetrics())

    class Server(uvicorn.Server):
        async def startup(self, sockets: list[socket.socket] | None = None) -> None:
            self.lifespan.state[STATE] = among
            await super().startup(sockets)

    server = Server(uvicorn.Config(app, http=BoundedProtocol, lifespan="off", log_config=None, access_log=False))
    task = asyncio.create_task(server._serve([port]))
    while not server.started:
        await asyncio.sleep(0.01)
    return server, task


def test_a_head_that_does_not_come_ends_its_connection(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connections, "HEAD_S", 0.2)
    monkeypatch.setattr(connections, "IDLE_S", 0.2)

    async def scenario() -> None:
        port = socket.create_server(("127.0.0.1", 0))
        address = port.getsockname()
        server, task = await listening(port)
        silent, slow, asking = [await asyncio.open_connection(*address) for _ in range(3)]
        slow[1].write(b"GET / HTTP/1.1\r\nx: ")
        asking[1].write(b"GET / HTTP/1.1\r\nhost: x\r\n\r\n")
        assert b"200" in await asking[0].readline()
        asking[1].write(b"GET / HT")  # a second head that never ends
        for reader, writer in (silent, slow, asking):
            while await asyncio.wait_for(reader.read(1000), 30):
                pass
            writer.close()
        server.should_exit = True
        await asyncio.wait_for(task, 30)

    asyncio.run(scenario())
