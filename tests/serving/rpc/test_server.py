"""The shared server over loopback: gate, access, TLS, statuses of errors, health, reflection, draining."""

from __future__ import annotations

import asyncio
import subprocess
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc import StatusCode
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from chunk_store.errors import StoreFull, StoreUnavailable
from protos import chunks_pb2, prefill_pb2, prefill_pb2_grpc
from serving.errors import Conflict, NotFound
from serving.rpc.access import Access
from serving.rpc.parsing import MESSAGE_NBYTES_MAX
from serving.rpc.server import RpcServer
from serving.rpc.tls import TlsFiles
from serving.trace.request_id import current_request_id
from text.errors import TextRefused

NAME = "cairn.v1.PrefillService"
SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING


class Scripted(prefill_pb2_grpc.PrefillServiceServicer):
    """Answers as told; counts what its generators release."""

    def __init__(self) -> None:
        self.error: Exception | None = None
        self.hold = asyncio.Event()
        self.entered = asyncio.Event()
        self.released = 0

    async def GetChunk(self, request: Any, context: Any) -> Any:
        if self.error is not None:
            raise self.error
        return chunks_pb2.Chunk(chunk_id=request.chunk_id, name=current_request_id())

    async def StoreStats(self, request: Any, context: Any) -> Any:
        self.entered.set()
        await self.hold.wait()
        return prefill_pb2.StoreStatsResponse()

    async def PrefillChunks(self, requests: Any, context: Any) -> AsyncIterator[Any]:
        try:
            async for request in requests:
                if request.name == "fail":
                    raise Conflict("fails on request", field="name")
                yield prefill_pb2.PrefillChunksResponse()
        finally:
            self.released += 1


class Running:
    """A server with a scripted service, not opened yet."""

    def __init__(self, access: Access | None = None, **options: Any) -> None:
        self.server = RpcServer(access or Access(), [NAME], **options)
        self.service = Scripted()  # type: ignore[abstract]  # the rest is as generated: UNIMPLEMENTED
        self.port = 0

    async def start(self, tls: TlsFiles | None = None) -> None:
        self.port = await self.server.start("127.0.0.1", 0, tls)

    async def open(self) -> None:
        await self.server.open(
            lambda server: prefill_pb2_grpc.add_PrefillServiceServicer_to_server(self.service, server)
        )

    def channel(self) -> grpc.aio.Channel:
        return grpc.aio.insecure_channel(f"127.0.0.1:{self.port}")


def serve(body: Callable[[Running, Any, grpc.aio.Channel], Awaitable[None]], access: Access | None = None) -> None:
    """Runs ``body`` against an open server, with a deadline."""

    async def main() -> None:
        running = Running(access)
        await running.start()
        try:
            await running.open()
            async with running.channel() as channel:
                await body(running, prefill_pb2_grpc.PrefillServiceStub(channel), channel)
        finally:  # one that is left running warns when it is collected, in the middle of some other test
            await running.server.drain(0.0)

    asyncio.run(asyncio.wait_for(main(), 120))


async def refused(call: Awaitable[Any]) -> tuple[StatusCode, str]:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    return caught.value.code(), caught.value.details() or ""


async def health(channel: grpc.aio.Channel, service: str = "") -> int:
    stub = health_pb2_grpc.HealthStub(channel)
    reply = await stub.Check(health_pb2.HealthCheckRequest(service=service))
    return int(reply.status)


def get(stub: Any, **metadata: Any) -> Awaitable[Any]:
    call: Awaitable[Any] = stub.GetChunk(
        prefill_pb2.GetChunkRequest(chunk_id="c"),
        metadata=tuple((name.replace("_", "-"), value) for name, value in metadata.items()),
        timeout=10,
    )
    return call


def test_starting_then_open() -> None:
    async def main() -> None:
        running = Running()
        await running.start()
        async with running.channel() as channel:
            stub = prefill_pb2_grpc.PrefillServiceStub(channel)
            assert await health(channel) == await health(channel, NAME) == NOT_SERVING
            code, message = await refused(get(stub))
            assert code is StatusCode.UNAVAILABLE and "starting" in message
            await running.open()
            assert await health(channel) == await health(channel, NAME) == SERVING
            assert (await get(stub, x_request_id="r1")).name == "r1"
        await running.server.drain(0.0)

    asyncio.run(asyncio.wait_for(main(), 120))


@pytest.mark.parametrize(
    ("error", "code", "words"),
    [
        (NotFound("unknown", field="chunk_id"), StatusCode.NOT_FOUND, "chunk_id: unknown"),
        (StoreUnavailable("disk gone"), StatusCode.UNAVAILABLE, "disk gone"),
        (StoreFull("no room"), StatusCode.RESOURCE_EXHAUSTED, "no room"),
        (TextRefused("role: refused"), StatusCode.INVALID_ARGUMENT, "role: refused"),
        (TimeoutError(), StatusCode.DEADLINE_EXCEEDED, "TimeoutError"),
        (KeyError("a prompt"), StatusCode.INTERNAL, "KeyError"),
    ],
)
def test_what_a_handler_raises_becomes_a_status(error: Exception, code: StatusCode, words: str) -> None:
    async def body(running: Running, stub: Any, channel: grpc.aio.Channel) -> None:
        running.service.error = error
        got, message = await refused(get(stub))
        assert got is code and words in message
        assert "a prompt" not in message
        running.service.error = None
        assert (await get(stub)).chunk_id == "c"

    serve(body)


def test_streams_fail_with_a_status_and_release() -> None:
    async def body(running: Running, stub: Any, channel: grpc.aio.Channel) -> None:
        requests = [prefill_pb2.PrefillChunkRequest(name=name) for name in ("a", "b", "fail", "c")]
        call = stub.PrefillChunks(iter(requests), timeout=60)
        replies = 0
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            async for _ in call:
                replies += 1
        assert (caught.value.code(), replies) == (StatusCode.ALREADY_EXISTS, 2)
        assert running.service.released == 1

    serve(body)


def test_a_cancelled_stream_releases_and_leaves() -> None:
    async def body(running: Running, stub: Any, channel: grpc.aio.Channel) -> None:
        call = stub.PrefillChunks(timeout=60)
        await call.write(prefill_pb2.PrefillChunkRequest(name="a"))
        await call.read()
        assert running.server.gate.running == 1
        call.cancel()
        assert await running.server.gate.wait_idle(15)
        while not running.service.released:
            await asyncio.sleep(0.01)
        assert running.service.released == 1

    serve(body)


def test_unknown_methods_stay_unimplemented() -> None:
    async def body(running: Running, stub: Any, channel: grpc.aio.Channel) -> None:
        code, _ = await refused(channel.unary_unary("/cairn.v1.PrefillService/Nothing", None, None)(b""))
        assert code is StatusCode.UNIMPLEMENTED
        assert running.server.gate.running == 0

    serve(body)


def test_tokens(tmp_path: Path) -> None:
    file = tmp_path / "tokens"
    file.write_text("# tenants\nsecret-a tenant-a\n\nsecret-b\n")
    access = Access.from_file(file)
    assert "secret" not in repr(access)

    async def body(running: Running, stub: Any, channel: grpc.aio.Channel) -> None:
        assert (await refused(get(stub)))[0] is StatusCode.UNAUTHENTICATED
        assert (await refused(get(stub, authorization="Bearer wrong")))[0] is StatusCode.UNAUTHENTICATED
        assert (await refused(get(stub, authorization="Basic secret-a")))[0] is StatusCode.UNAUTHENTICATED
        assert (await refused(stub.PrefillChunks(timeout=60).read()))[0] is StatusCode.UNAUTHENTICATED
        assert (await get(stub, authorization="Bearer secret-a")).chunk_id == "c"
        assert await health(channel) == SERVING

    serve(body, access)
    assert access.caller([("authorization", "Bearer secret-a")], "asked").salt == "tenant-a"
    assert access.caller([("authorization", "Bearer secret-b")], "asked").salt == "asked"
    assert Access().caller(None, "asked").salt == "asked"


@pytest.mark.parametrize("text", ["", "# nothing\n", "a b c\n", "a\na x\n"])
def test_bad_token_files(tmp_path: Path, text: str) -> None:
    file = tmp_path / "tokens"
    file.write_text(text)
    with pytest.raises(ValueError, match="tokens"):
        Access.from_file(file)


def test_tls(tmp_path: Path) -> None:
    tls = TlsFiles(tmp_path / "cert.pem", tmp_path / "key.pem")
    command = (
        "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 1 -subj /CN=localhost "
        f"-addext subjectAltName=DNS:localhost,IP:127.0.0.1 -keyout {tls.key} -out {tls.cert}"
    )
    subprocess.run(command.split(), check=True, capture_output=True)

    async def main() -> None:
        running = Running()
        await running.start(tls)
        await running.open()
        trust = grpc.ssl_channel_credentials(tls.cert.read_bytes())
        async with grpc.aio.secure_channel(f"127.0.0.1:{running.port}", trust) as channel:
            assert (await get(prefill_pb2_grpc.PrefillServiceStub(channel))).chunk_id == "c"
        async with running.channel() as channel:
            assert (await refused(get(prefill_pb2_grpc.PrefillServiceStub(channel))))[0] is StatusCode.UNAVAILABLE
        await running.server.drain(0.0)

    asyncio.run(asyncio.wait_for(main(), 120))


def test_reflection_names_the_service() -> None:
    async def body(running: Running, stub: Any, channel: grpc.aio.Channel) -> None:
        reflection = reflection_pb2_grpc.ServerReflectionStub(channel)
        ask = reflection_pb2.ServerReflectionRequest(list_services="")
        async for reply in reflection.ServerReflectionInfo(iter([ask])):
            names = {service.name for service in reply.list_services_response.service}
            assert {NAME, "grpc.health.v1.Health"} <= names

    serve(body)


def test_messages_are_bounded() -> None:
    async def body(running: Running, stub: Any, channel: grpc.aio.Channel) -> None:
        request = prefill_pb2.GetChunkRequest(chunk_id="x" * (MESSAGE_NBYTES_MAX + 1))
        assert (await refused(stub.GetChunk(request, timeout=60)))[0] is StatusCode.RESOURCE_EXHAUSTED

    serve(body)


def test_a_port_in_use_is_an_error() -> None:
    async def body(running: Running, stub: Any, channel: grpc.aio.Channel) -> None:
        other = RpcServer(Access(), [NAME])
        with pytest.raises(OSError, match="in use"):
            await other.start("127.0.0.1", running.port)

    serve(body)


def test_draining_lets_running_calls_end_and_refuses_new_ones() -> None:
    async def body(running: Running, stub: Any, channel: grpc.aio.Channel) -> None:
        watch = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest())
        assert (await watch.read()).status == SERVING
        held = asyncio.ensure_future(stub.StoreStats(prefill_pb2.StoreStatsRequest(), timeout=60))
        await running.service.entered.wait()
        draining = asyncio.create_task(running.server.drain(10.0))
        assert (await watch.read()).status == NOT_SERVING
        code, message = await refused(get(stub))
        assert code is StatusCode.UNAVAILABLE and "shutting down" in message
        running.service.hold.set()
        assert await held == prefill_pb2.StoreStatsResponse()
        assert await draining is True

    serve(body)


def test_draining_ends_at_its_deadline() -> None:
    async def body(running: Running, stub: Any, channel: grpc.aio.Channel) -> None:
        held = asyncio.ensure_future(stub.StoreStats(prefill_pb2.StoreStatsRequest(), timeout=60))
        await running.service.entered.wait()
        assert await running.server.drain(0.1) is False
        assert (await refused(held))[0] in (StatusCode.UNAVAILABLE, StatusCode.CANCELLED)
        assert running.server.gate.running == 0

    serve(body)
