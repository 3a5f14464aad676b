"""The device queue: bounded, one thread, a tenant's turn, and steps that are taken back before they begin."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable, Callable

import pytest

from chunk_store.tenant import Tenant
from prefill_service.worker import DeviceQueue
from serving.errors import Overloaded
from serving.tenancy.quotas import Quotas, TenantQuotas
from serving.trace.stages import StageTimer

A, B = Tenant("a"), Tenant("b")


def run(body: Callable[[DeviceQueue], Awaitable[None]], queue: DeviceQueue) -> None:
    try:
        asyncio.run(asyncio.wait_for(body(queue), 30))
    finally:
        queue.close()


def test_places_are_bounded_and_come_back() -> None:
    queue = DeviceQueue(2)
    queue.take_place(A)
    queue.take_place(A)
    with pytest.raises(Overloaded) as caught:
        queue.take_place(A)
    assert caught.value.retry_after_s and queue.jobs == 2
    queue.leave_place(A)
    queue.take_place(A)
    queue.close()


def test_a_quota_of_jobs_is_named() -> None:
    queue = DeviceQueue(100, TenantQuotas({A: Quotas(jobs=1)}))
    queue.take_place(A)
    with pytest.raises(Overloaded, match="quota jobs"):
        queue.take_place(A)
    queue.take_place(B)
    queue.close()


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
    async def body(queue: DeviceQueue) -> None:
        first, order, names = Blocked(), [], set()
        timer = StageTimer()

        def step(word: str) -> None:
            order.append(word)
            names.add(threading.current_thread().name)

        held = asyncio.create_task(queue.run(first, StageTimer(), A))
        await entered(first)
        words = [("a1", A), ("a2", A), ("a3", A), ("b1", B), ("b2", B)]
        waiting = []
        for word, tenant in words:
            waiting.append(asyncio.create_task(queue.run(lambda word=word: step(word), timer, tenant)))  # type: ignore[misc]
            await asyncio.sleep(0)
        first.release.set()
        names.add(await held)
        await asyncio.gather(*waiting)
        assert order == ["b1", "a1", "b2", "a2", "a3"] and len(names) == 1
        assert timer.spent_ns()["queue"] > 0

    run(body, DeviceQueue(8))


def test_a_step_that_has_not_begun_is_taken_back_and_one_that_has_is_waited_for() -> None:
    async def body(queue: DeviceQueue) -> None:
        first, ran = Blocked(), []
        begun = asyncio.create_task(queue.run(first, StageTimer()))
        await entered(first)
        waiting = asyncio.create_task(queue.run(lambda: ran.append(1), StageTimer()))
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
        assert await queue.run(lambda: 7, StageTimer()) == 7 and not ran

    run(body, DeviceQueue(8))


def test_what_a_step_raises_is_its_callers() -> None:
    async def body(queue: DeviceQueue) -> None:
        with pytest.raises(ZeroDivisionError):
            await queue.run(lambda: 1 // 0, StageTimer())
        assert await queue.run(lambda: "still there", StageTimer()) == "still there"

    run(body, DeviceQueue(8))


def test_closing_drops_what_has_not_begun() -> None:
    async def main() -> None:
        queue, first = DeviceQueue(8), Blocked()
        begun = asyncio.create_task(queue.run(first, StageTimer()))
        await entered(first)
        waiting = asyncio.create_task(queue.run(lambda: 1, StageTimer()))
        await asyncio.sleep(0)
        closing = asyncio.create_task(asyncio.to_thread(queue.close))
        await asyncio.wait([closing], timeout=0.05)
        assert not closing.done(), "it waits for the step that has begun"
        first.release.set()
        await closing
        assert await begun
        done, _ = await asyncio.wait([waiting], timeout=10)
        assert done and (waiting.cancelled() or waiting.result() == 1)

    asyncio.run(asyncio.wait_for(main(), 30))
