"""The line of jobs: bounded. The device thread: one, a tenant's turn, and steps taken back before they begin."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable, Callable

import pytest

from chunk_store.tenant import Tenant
from prefill_service.worker import DeviceThread, JobLine
from serving.errors import Overloaded
from serving.tenancy.quotas import Quotas, TenantQuotas
from serving.trace.stages import StageTimer

A, B = Tenant("a"), Tenant("b")


def run(body: Callable[[DeviceThread], Awaitable[None]]) -> None:
    device = DeviceThread()
    try:
        asyncio.run(asyncio.wait_for(body(device), 30))
    finally:
        device.close()


def test_places_are_bounded_and_come_back() -> None:
    queue = JobLine(2)
    queue.take_place(A)
    queue.take_place(A)
    with pytest.raises(Overloaded) as caught:
        queue.take_place(A)
    assert caught.value.retry_after_s and queue.jobs == 2
    queue.leave_place(A)
    queue.take_place(A)


def test_a_quota_of_jobs_is_named() -> None:
    queue = JobLine(100, TenantQuotas({A: Quotas(jobs=1)}))
    queue.take_place(A)
    with pytest.raises(Overloaded, match="quota jobs"):
        queue.take_place(A)
    queue.take_place(B)


class Blocked:
    """A step that holds the device thread until it is released."""

    def __init__(self) -> None:
        self.entered, self.release = threading.Event(), threading.Event()

    def __call__(self) -> str:
        self.entered.set()
        assert self.release.wait(20)
        return threading.current_thread().name


async def entered(step: Blocked) -> None:
    assert await asyncio.to_thread(step.entered.wait, 20)


def test_one_thread_runs_the_steps_and_of_tenants_one_each_in_turn() -> None:
    async def body(device: DeviceThread) -> None:
        first, order, names = Blocked(), [], set()
        timer = StageTimer()

        def step(word: str) -> None:
            order.append(word)
            names.add(threading.current_thread().name)

        held = asyncio.create_task(device.run(first, StageTimer(), A))
        await entered(first)
        words = [("a1", A), ("a2", A), ("a3", A), ("b1", B), ("b2", B)]
        waiting = []
        for word, tenant in words:
            waiting.append(asyncio.create_task(device.run(lambda word=word: step(word), timer, tenant)))  # type: ignore[misc]
            await asyncio.sleep(0)
        assert device.others_wait(A) and device.others_wait(B)
        first.release.set()
        names.add(await held)
        await asyncio.gather(*waiting)
        assert not device.others_wait(A)
        assert order == ["b1", "a1", "b2", "a2", "a3"] and len(names) == 1
        assert timer.spent_ns()["queue"] > 0

    run(body)


def test_a_step_that_has_not_begun_is_taken_back_and_one_that_has_is_waited_for() -> None:
    async def body(device: DeviceThread) -> None:
        first, ran = Blocked(), []
        begun = asyncio.create_task(device.run(first, StageTimer()))
        await entered(first)
        waiting = asyncio.create_task(device.run(lambda: ran.append(1), StageTimer()))
        await asyncio.sleep(0)
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        begun.cancel()
        await asyncio.sleep(0.01)
        assert not begun.done(), "the thread still works for it"
        first.release.set()
        with pytest.raises(asyncio.CancelledError):
            await begun
        assert await device.run(lambda: 7, StageTimer()) == 7 and not ran

    run(body)


def test_what_a_step_raises_is_its_callers() -> None:
    async def body(device: DeviceThread) -> None:
        with pytest.raises(ZeroDivisionError):
            await device.run(lambda: 1 // 0, StageTimer())
        assert await device.run(lambda: "still there", StageTimer()) == "still there"

    run(body)


def test_closing_drops_what_has_not_begun() -> None:
    async def main() -> None:
        device, first = DeviceThread(), Blocked()
        begun = asyncio.create_task(device.run(first, StageTimer()))
        await entered(first)
        waiting = asyncio.create_task(device.run(lambda: 1, StageTimer()))
        await asyncio.sleep(0)
        closing = asyncio.create_task(asyncio.to_thread(device.close))
        await asyncio.wait([closing], timeout=0.05)
        assert not closing.done(), "it waits for the step that has begun"
        first.release.set()
        await closing
        assert await begun
        done, _ = await asyncio.wait([waiting], timeout=10)
        assert done and (waiting.cancelled() or waiting.result() == 1)

    asyncio.run(asyncio.wait_for(main(), 30))


def test_what_is_posted_runs_between_two_steps_until_the_end() -> None:
    ran: list[str] = []

    async def body(device: DeviceThread) -> None:
        first = Blocked()
        begun = asyncio.create_task(device.run(first, StageTimer()))
        await entered(first)
        device.post(lambda: ran.append(threading.current_thread().name))
        assert not ran
        first.release.set()
        name = await begun
        await device.run(lambda: None, StageTimer())
        assert ran == [name]
        await asyncio.to_thread(device.close)
        with pytest.raises(RuntimeError):
            device.post(lambda: None)

    run(body)
