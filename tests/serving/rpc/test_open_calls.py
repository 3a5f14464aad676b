"""Clients that hold calls open and do nothing: others are answered all the same, and what is held is given up."""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import replace
from typing import Any

import grpc
import pytest
from grpc import StatusCode
from grpc_health.v1 import health_pb2, health_pb2_grpc

from protos import prefill_pb2, prefill_pb2_grpc
from serving.errors import DeadlineExceeded, Unavailable
from serving.rpc.access import Access, Grant
from serving.rpc.open_calls import DRAIN_MESSAGE_S, Bounds, CallKind, CallLimits, Holder, OpenCall, OpenCalls
from tests.serving.rpc.raw_http2 import RawConnection, grpc_message
from tests.serving.rpc.test_server import Running, get, health

PREFIX = "/cairn.v1.PrefillService/"
WATCH = "/grpc.health.v1.Health/Watch"
CHECK = "/grpc.health.v1.Health/Check"
MANY = 1100
SHORT = CallLimits(message_s=1.0, idle_s=1.0, write_s=1.0)
PATIENT = CallLimits()
UNREAD = CallLimits(write_s=1.0)


def serve(
    body: Callable[[Running, Any], Awaitable[None]], limits: CallLimits = PATIENT, access: Access | None = None
) -> None:
    """Runs ``body`` against an open server; afterwards another client is answered, and so is a health check."""

    async def main() -> None:
        running = Running(access, limits=limits)
        await running.start()
        await running.open()
        try:
            await body(running, prefill_pb2_grpc.PrefillServiceStub)
        finally:
            await running.server.drain(0.0)

    asyncio.run(asyncio.wait_for(main(), 120))


def another(running: Running) -> grpc.aio.Channel:
    """A connection that nobody else uses."""
    return grpc.aio.insecure_channel(f"127.0.0.1:{running.port}", [("grpc.use_local_subchannel_pool", 1)])


async def answered(stub: Any) -> Any:
    """A reply, as a client gets it that tries again when it was refused; any other status is a failure."""
    for _ in range(4):
        try:
            return await get(stub)
        except grpc.aio.AioRpcError as error:
            assert error.code() is StatusCode.RESOURCE_EXHAUSTED, error
        await asyncio.sleep(0.2)
    return await get(stub)


async def others_are_answered(running: Running) -> None:
    async with another(running) as channel:
        stub = prefill_pb2_grpc.PrefillServiceStub(channel)
        assert (await answered(stub)).chunk_id == "c"
        stream = stub.PrefillChunks(iter([prefill_pb2.PrefillChunkRequest()]), timeout=30)
        assert len([reply async for reply in stream]) == 1
        assert await health(channel) == health_pb2.HealthCheckResponse.SERVING
        watch = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest(), timeout=30)
        assert (await watch.read()).status == health_pb2.HealthCheckResponse.SERVING


async def ended(raw: RawConnection, streams: set[int]) -> None:
    async with asyncio.timeout(60):
        while not streams <= raw.ended():
            await asyncio.to_thread(raw.pump, 0.05)


async def until(holds: Callable[[], bool]) -> None:
    async with asyncio.timeout(60):
        while not holds():
            await asyncio.sleep(0.01)


Opener = Callable[[RawConnection], int]
HELD: dict[str, Opener] = {
    "health watches": lambda raw: raw.open(WATCH, grpc_message(b""), end=True),
    "health watches without a message": lambda raw: raw.open(WATCH),
    "health checks without a message": lambda raw: raw.open(CHECK),
    "idle streams": lambda raw: raw.open(PREFIX + "PrefillChunks"),
    "unary calls without a message": lambda raw: raw.open(PREFIX + "GetChunk"),
    "half a message": lambda raw: raw.open(PREFIX + "GetChunk", grpc_message(b"\x0a", announced=10_000)),
    "streams that are never half-closed": lambda raw: raw.open(PREFIX + "PrefillChunks", grpc_message(b"")),
}


@pytest.mark.parametrize(
    ("what", "connections"), [*((what, 2) for what in HELD), ("health watches", 70), ("idle streams", 70)]
)
def test_held_calls_keep_nobody_out(what: str, connections: int) -> None:
    async def body(running: Running, _: Any) -> None:
        raws = [RawConnection(running.port) for _ in range(connections)]
        seen = running.server.gate.calls
        for _ in range(MANY // connections):
            for raw in raws:
                HELD[what](raw)
            await asyncio.sleep(0)
        await until(lambda: sum(seen.count(kind) for kind in CallKind) >= 32)
        await others_are_answered(running)
        for kind in CallKind:
            assert seen.count(kind) <= PATIENT.of(kind).address
        for raw in raws:
            raw.close()
        await until(lambda: sum(seen.count(kind) for kind in CallKind) == 0)

    serve(body)


def test_calls_that_come_while_the_loop_is_held_up_are_not_cut_off() -> None:
    """By itself grpc ends half of these with CANCELLED."""

    def ask(running: Running, raws: list[RawConnection]) -> set[StatusCode]:
        for number in range(3 * MANY):
            raws[number % len(raws)].open(PREFIX + "GetChunk")
        with grpc.insecure_channel(f"127.0.0.1:{running.port}", [("grpc.use_local_subchannel_pool", 1)]) as channel:
            stub = prefill_pb2_grpc.PrefillServiceStub(channel)
            calls = [stub.GetChunk.future(prefill_pb2.GetChunkRequest(chunk_id="c"), timeout=60) for _ in range(100)]
            return {call.code() for call in calls}

    async def body(running: Running, _: Any) -> None:
        raws = [RawConnection(running.port) for _ in range(4)]
        asking = asyncio.ensure_future(asyncio.to_thread(ask, running, raws))
        await asyncio.sleep(0.05)
        time.sleep(2.0)  # the loop is held up
        assert await asking == {StatusCode.OK}
        for raw in raws:
            raw.close()

    serve(body)


@pytest.mark.parametrize("connections", [1, 40])
@pytest.mark.parametrize("method", ["GetChunk", "PrefillChunks"])
def test_replies_that_are_not_taken_keep_nobody_out(method: str, connections: int) -> None:
    async def body(running: Running, _: Any) -> None:
        raws = [RawConnection(running.port, window=0) for _ in range(connections)]
        for _ in range(MANY // connections):
            for raw in raws:
                raw.open(PREFIX + method, grpc_message(b""), end=True)
            await asyncio.sleep(0)
        await until(lambda: running.server.gate.calls.unread >= 32)
        await others_are_answered(running)
        for raw in raws:
            raw.close()
        await until(lambda: running.server.gate.calls.unread == running.server.gate.running == 0)

    serve(body, UNREAD)


def test_a_connection_that_takes_no_replies_is_refused_more_calls() -> None:
    async def body(running: Running, _: Any) -> None:
        calls = running.server.gate.calls
        raw = RawConnection(running.port, window=0)
        streams = [raw.open(PREFIX + "GetChunk", grpc_message(b""), end=True) for _ in range(SHORT.unread)]
        await until(lambda: calls.unread == SHORT.unread)
        refused = raw.open(PREFIX + "GetChunk", grpc_message(b""), end=True)
        await ended(raw, {refused})
        assert raw.ended() == {refused}
        for stream in streams:
            raw.widen(stream, 65535)
        await until(lambda: calls.unread == 0)
        raw.close()

    serve(body, SHORT)


@pytest.mark.parametrize("what", [name for name in HELD if name != "health watches"])
def test_what_waits_for_its_client_ends_at_its_deadline(what: str) -> None:
    async def body(running: Running, _: Any) -> None:
        raw = RawConnection(running.port)
        stream = HELD[what](raw)
        await until(lambda: sum(running.server.gate.calls.count(kind) for kind in CallKind) == 1)
        await until(lambda: sum(running.server.gate.calls.count(kind) for kind in CallKind) == 0)
        await ended(raw, {stream})
        raw.close()

    serve(body, SHORT)


def test_deadlines_are_for_waiting_not_for_work() -> None:
    async def body(running: Running, stub: Any) -> None:
        async with another(running) as channel:
            held = asyncio.ensure_future(stub(channel).StoreStats(prefill_pb2.StoreStatsRequest(), timeout=30))
            await running.service.entered.wait()
            idle = stub(channel).PrefillChunks(timeout=30)
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await idle.read()
            assert caught.value.code() is StatusCode.DEADLINE_EXCEEDED
            assert "within 1 s" in (caught.value.details() or "")
            running.service.hold.set()
            assert await held == prefill_pb2.StoreStatsResponse()

    serve(body, SHORT)


def test_a_call_that_works_is_never_ended_for_another() -> None:
    tight = replace(PATIENT, work=Bounds(2, 2, 2, 2))

    async def body(running: Running, stub: Any) -> None:
        async with another(running) as channel, another(running) as other:
            held = [
                asyncio.ensure_future(stub(channel).StoreStats(prefill_pb2.StoreStatsRequest(), timeout=30))
                for _ in range(2)
            ]
            await until(lambda: running.server.gate.running == 2)
            await running.service.entered.wait()
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await get(stub(other))
            assert caught.value.code() is StatusCode.RESOURCE_EXHAUSTED
            assert "2 calls of this address are open" in (caught.value.details() or "")
            running.service.hold.set()
            assert len(await asyncio.gather(*held)) == 2
            assert (await get(stub(other))).chunk_id == "c"

    serve(body, tight)


def test_a_bound_is_each_tokens_own() -> None:
    access = Access({_digest(word): Grant() for word in ("one", "two")})
    tight = replace(PATIENT, work=Bounds(9, 1, 9, 9))

    async def body(running: Running, stub: Any) -> None:
        async with another(running) as channel:
            held = asyncio.ensure_future(
                stub(channel).StoreStats(
                    prefill_pb2.StoreStatsRequest(), metadata=(("authorization", "Bearer one"),), timeout=30
                )
            )
            await running.service.entered.wait()
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await get(stub(channel), authorization="Bearer one")
            assert "1 calls with this token" in (caught.value.details() or "")
            assert (await get(stub(channel), authorization="Bearer two")).chunk_id == "c"
            running.service.hold.set()
            await held

    serve(body, tight, access)


def test_a_watch_whose_reader_takes_nothing_delays_neither_opening_nor_draining() -> None:
    async def main() -> None:
        running = Running()
        await running.start()
        raw = RawConnection(running.port, window=0)
        raw.open(WATCH, grpc_message(b""), end=True)
        await until(lambda: running.server.gate.calls.count(CallKind.WATCH) == 1)
        await running.open()
        await others_are_answered(running)
        await running.server.drain(0.0)
        raw.close()

    asyncio.run(asyncio.wait_for(main(), 60))


def test_draining_ends_who_waits_for_a_message_and_nobody_who_hands_out_a_reply() -> None:
    async def main() -> None:
        calls, loop = OpenCalls(CallLimits()), asyncio.get_running_loop()
        closing, slow = Unavailable("drains"), DeadlineExceeded("slow")
        async with asyncio.timeout(None) as first, asyncio.timeout(None) as second, asyncio.timeout(None) as third:
            writes, waits, works = (
                OpenCall(CallKind.WORK, Holder("ipv4:1.2.3.4:5"), d) for d in (first, second, third)
            )
            for call in (writes, waits, works):
                calls.enter(call)
            writes.waits(30.0, slow)
            waits.awaits_message(120.0, slow)
            works.works()
            calls.close(closing)
            assert writes.ending is slow and (writes.due or 0) > loop.time() + 20
            assert waits.ending is closing and (waits.due or 0) <= loop.time() + DRAIN_MESSAGE_S
            assert works.due is None
            works.awaits_message(120.0, slow)  # only now is it done
            assert works.ending is closing and (works.due or 0) <= loop.time() + DRAIN_MESSAGE_S
            for call in (writes, waits, works):
                call.works()
                calls.leave(call)
            assert calls.no_work.is_set()

    asyncio.run(asyncio.wait_for(main(), 30))


def test_a_call_that_waits_again_and_again_has_one_timer_and_ends_when_it_waits_too_long(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A stream waits for its client with every message: no timer is made for each."""

    async def main() -> None:
        loop, timers, slow = asyncio.get_running_loop(), list[float](), DeadlineExceeded("slow")
        call_at = loop.call_at

        def counted(when: float, *given: Any, **named: Any) -> asyncio.TimerHandle:
            timers.append(when)
            return call_at(when, *given, **named)

        calls = OpenCalls(CallLimits())
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(None) as deadline:
                call = OpenCall(CallKind.WORK, Holder("ipv4:1.2.3.4:5"), deadline)
                calls.enter(call)
                monkeypatch.setattr(loop, "call_at", counted)
                for _ in range(1000):
                    call.waits(30.0, slow)
                    call.works()
                assert len(timers) == 1 and call.due is None
                call.waits(0.02, slow)  # sooner than the timer
                assert len(timers) == 2
                call.works()
                await asyncio.sleep(0.05)  # it rings, and nothing is due
                assert not deadline.expired()
                call.waits(0.01, slow)
                await asyncio.sleep(30)
        assert deadline.expired() and call.ending is slow
        calls.leave(call)

    asyncio.run(asyncio.wait_for(main(), 60))


def test_what_was_about_to_end_goes_on_if_its_client_comes_in_time() -> None:
    async def main() -> None:
        calls, slow = OpenCalls(CallLimits()), DeadlineExceeded("slow")
        async with asyncio.timeout(None) as deadline:
            call = OpenCall(CallKind.WORK, Holder("ipv4:1.2.3.4:5"), deadline)
            calls.enter(call)
            call.waits(0.0, slow)
            call._ring()  # the timer has rung, the task has not been told yet
            assert deadline.when() is not None
            call.works()
            await asyncio.sleep(0.01)
            assert deadline.when() is None and not deadline.expired()
        calls.leave(call)

    asyncio.run(asyncio.wait_for(main(), 60))


def test_draining_does_not_wait_for_idle_streams() -> None:
    async def body(running: Running, stub: Any) -> None:
        async with another(running) as channel:
            idle = stub(channel).PrefillChunks(timeout=30)
            await idle.write(prefill_pb2.PrefillChunkRequest())
            await idle.read()
            await until(lambda: running.server.gate.running == 1)
            async with asyncio.timeout(20):
                assert await running.server.drain(60.0) is True
            with suppress(grpc.aio.AioRpcError):
                await idle.read()
            assert await idle.code() is StatusCode.UNAVAILABLE

    serve(body)


@pytest.mark.parametrize(
    ("connection", "address"),
    [
        ("ipv4:10.0.0.7:40312", "10.0.0.7"),
        ("ipv6:%5B2001:db8:1:2:3::9%5D:55", "2001:db8:1:2::/64"),
        ("ipv6:[::1]:55", "::/64"),
        ("unix:/run/cairn.sock", "unix:/run/cairn.sock"),
        ("unknown", "unknown"),
    ],
)
def test_addresses(connection: str, address: str) -> None:
    assert Holder(connection).address == address
    assert Holder(connection).scopes().keys() == {"connection", "address", "total"}
    assert Holder(connection, "t").scopes()["token"] == "t"


def test_an_undecodable_message_is_the_callers_fault(caplog: pytest.LogCaptureFixture) -> None:
    async def body(running: Running, stub: Any) -> None:
        async with another(running) as channel:
            for method in ("GetChunk", "ListChunks", "PrefillChunk", "StoreStats"):
                for raw in (b"\xff", b"\x0a\xff", b"\x0a\x05a"):
                    with pytest.raises(grpc.aio.AioRpcError) as caught:
                        await channel.unary_unary(PREFIX + method, None, None)(raw)
                    assert caught.value.code() is StatusCode.INVALID_ARGUMENT, (method, raw, caught.value)
                    assert "message: these" in (caught.value.details() or "")
            call = channel.stream_stream(PREFIX + "PrefillChunks", None, None)(iter([b"", b"\xff"]))
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                async for _ in call:
                    pass
            assert caught.value.code() is StatusCode.INVALID_ARGUMENT
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await channel.stream_unary(PREFIX + "GetChunk", None, None)(iter([]))
            assert caught.value.code() is StatusCode.INVALID_ARGUMENT and "missing" in (caught.value.details() or "")

    serve(body)
    assert not [record for record in caplog.records if record.exc_info]


def test_refusals_wait_for_no_message() -> None:
    access = Access({_digest("word"): Grant()})

    async def body(running: Running, _: Any) -> None:
        raw = RawConnection(running.port)
        streams = {raw.open(PREFIX + method) for method in ("GetChunk", "PrefillChunks")}
        await ended(raw, streams)
        assert running.server.gate.running == 0
        raw.close()

    serve(body, access=access)


def _digest(word: str) -> str:
    return hashlib.sha256(word.encode()).hexdigest()
