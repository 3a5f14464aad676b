"""Every call is counted by method and status, wherever it ends; its request id comes, goes and is bounded."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc import StatusCode
from grpc_health.v1 import health_pb2, health_pb2_grpc
from prometheus_client import CollectorRegistry

from protos import prefill_pb2
from serving.errors import NotFound
from serving.rpc.access import Access
from tests.serving.rpc.test_server import Running, get, refused, serve


def ended(running: Running) -> dict[tuple[str, str], float]:
    """RPCs that ended by method and code, without those that none did."""
    registry = CollectorRegistry()
    registry.register(running.server.metrics)
    samples = [
        sample for family in registry.collect() for sample in family.samples if sample.name == "cairn_rpcs_total"
    ]
    return {(s.labels["method"], s.labels["code"]): s.value for s in samples if s.value}


async def until(running: Running, *expected: dict[tuple[str, str], float]) -> None:
    """One of ``expected``. The last callbacks of a call run after its caller has the answer."""
    for _ in range(500):
        if ended(running) in expected:
            return
        await asyncio.sleep(0.01)
    assert ended(running) in expected


def test_every_method_and_status_is_there_from_the_start() -> None:
    async def main() -> None:
        running = Running()
        registry = CollectorRegistry()
        registry.register(running.server.metrics)
        found = {
            (s.labels["method"], s.labels["code"]): s.value
            for family in registry.collect()
            for s in family.samples
            if s.name == "cairn_rpcs_total"
        }
        methods = {method for method, _ in found}
        assert {"PrefillChunk", "PrefillChunks", "GetChunk", "StoreStats", "Check", "Watch", "other"} <= methods
        assert found.keys() == {(method, code.name) for method in methods for code in StatusCode}
        assert set(found.values()) == {0.0}

    asyncio.run(main())


def test_answers_refusals_and_faults() -> None:
    async def body(running: Running, stub: Any, channel: grpc.aio.Channel) -> None:
        await get(stub)
        running.service.error = NotFound("unknown", field="chunk_id")
        await refused(get(stub))
        running.service.error = RuntimeError("boom")
        await refused(get(stub))
        await refused(channel.unary_unary("/cairn.v1.PrefillService/NoSuch", None, None)(b"", timeout=10))
        await refused(channel.unary_unary("/x.Y/" + "n" * 1000, None, None)(b"", timeout=10))
        await health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest())
        await until(
            running,
            {
                ("GetChunk", "OK"): 1,
                ("GetChunk", "NOT_FOUND"): 1,
                ("GetChunk", "INTERNAL"): 1,
                ("other", "UNIMPLEMENTED"): 2,
                ("Check", "OK"): 1,
            },
        )

    serve(body)


def test_those_refused_at_the_door(tmp_path: Path) -> None:
    path = tmp_path / "tokens"
    path.write_text("secret\n")

    async def body(running: Running, stub: Any, channel: grpc.aio.Channel) -> None:
        await refused(get(stub))
        running.server.gate.close()
        await refused(get(stub, authorization="Bearer secret"))
        await until(running, {("GetChunk", "UNAUTHENTICATED"): 1, ("GetChunk", "UNAVAILABLE"): 1})

    serve(body, Access.from_file(path))


def test_messages_that_are_none_or_too_large() -> None:
    async def body(running: Running, stub: Any, channel: grpc.aio.Channel) -> None:
        running.server.gate.message_nbytes_max = 1000
        raw = channel.unary_unary("/cairn.v1.PrefillService/GetChunk", None, None)
        assert (await refused(raw(b"\xff\xff", timeout=10)))[0] is StatusCode.INVALID_ARGUMENT
        code, _ = await refused(raw(b"\x0a\x90\x4e" + b"a" * 10_000, timeout=10))
        assert code is StatusCode.RESOURCE_EXHAUSTED
        await until(running, {("GetChunk", "INVALID_ARGUMENT"): 1, ("GetChunk", "RESOURCE_EXHAUSTED"): 1})

    serve(body)


def test_callers_who_leave() -> None:
    async def body(running: Running, stub: Any, channel: grpc.aio.Channel) -> None:
        call = stub.StoreStats(prefill_pb2.StoreStatsRequest())
        await running.service.entered.wait()
        call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await call
        assert (await refused(stub.StoreStats(prefill_pb2.StoreStatsRequest(), timeout=0.2)))[0] is (
            StatusCode.DEADLINE_EXCEEDED
        )
        stream = stub.PrefillChunks()
        await stream.write(prefill_pb2.PrefillChunkRequest())
        await stream.read()
        stream.cancel()
        watch = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest())
        await watch.read()
        watch.cancel()
        others = {
            ("StoreStats", "CANCELLED"): 1.0,
            ("StoreStats", "DEADLINE_EXCEEDED"): 1.0,
            ("Watch", "CANCELLED"): 1.0,
        }
        # A handler that waits for the next message may see that there is none before it sees that its caller has left.
        await until(running, *({**others, ("PrefillChunks", code): 1.0} for code in ("CANCELLED", "OK")))

    serve(body)


def test_a_request_id_comes_goes_and_is_made() -> None:
    async def body(running: Running, stub: Any, channel: grpc.aio.Channel) -> None:
        async def ids(**metadata: Any) -> tuple[str, str]:
            """As the handler's log lines bear it, and as the caller gets it back."""
            call: Any = get(stub, **metadata)
            name = (await call).name
            return name, dict(await call.trailing_metadata())["x-request-id"]

        assert await ids(x_request_id="mine-1") == ("mine-1", "mine-1")
        inside, outside = await ids(x_request_id="x" * 1000 + " y")
        assert inside == outside == "x" * 128
        made = await ids()
        assert made[0] == made[1] and len(made[0]) == 32 and made != await ids()
        running.service.error = RuntimeError("boom")
        _, details = await refused(get(stub, x_request_id="mine-2"))
        assert "mine-2" in details and "boom" not in details

    serve(body)
