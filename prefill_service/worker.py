"""The bounded line of jobs, and the one thread that launches device work for them. It knows no chunks.

Of several tenants' jobs one of each is taken in turn.
"""

from __future__ import annotations

import asyncio
import contextvars
import logging
import threading
import time
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

from chunk_store.tenant import DEFAULT_TENANT, Tenant
from serving.errors import Overloaded
from serving.tenancy.places import Places, PlacesFull, Rotation, quota_full
from serving.tenancy.quotas import TenantQuotas
from serving.trace.stages import StageTimer

T = TypeVar("T")
log = logging.getLogger(__name__)

RETRY_AFTER_S = 1.0  # what a refused request is told


class JobLine:
    """At most ``jobs_max`` jobs wait or run; the next is refused, but for tenants with less than their share."""

    def __init__(self, jobs_max: int, quotas: TenantQuotas | None = None) -> None:
        self._quotas = quotas or TenantQuotas()
        self._places = Places(jobs_max)

    @property
    def jobs(self) -> int:
        """Jobs that have a place now."""
        return self._places.taken

    def take_place(self, tenant: Tenant = DEFAULT_TENANT) -> None:
        """A place in the line, until ``leave_place``. Raises ``Overloaded`` without one."""
        most = self._quotas.of(tenant).jobs
        try:
            if most is not None and self._places.of(tenant) >= most:
                raise quota_full("jobs", most)
            self._places.take(tenant)
        except PlacesFull as error:
            raise Overloaded(str(error), retry_after_s=RETRY_AFTER_S) from error

    def leave_place(self, tenant: Tenant = DEFAULT_TENANT) -> None:
        self._places.leave(tenant)


class DeviceThread:
    """Runs one step after another, of several tenants' in turn."""

    def __init__(self) -> None:
        self._rotation = Rotation()
        self._steps: list[tuple[Tenant, Future[Any], Callable[[], Any]]] = []  # in the order they came
        self._lock = threading.Lock()  # of the steps
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="device")

    async def run(self, step: Callable[[], T], timer: StageTimer, tenant: Tenant = DEFAULT_TENANT) -> T:
        """Runs ``step`` on the device thread in the tenant's turn; its wait is the stage ``queue``.

        Cancelled, it takes back a step that has not begun, and ends with one that has.
        """
        asked_ns = time.perf_counter_ns()
        context = contextvars.copy_context()

        def begin() -> T:
            timer.add("queue", time.perf_counter_ns() - asked_ns)
            return context.run(step)

        work: Future[T] = Future()
        with self._lock:
            self._steps.append((tenant, work, begin))
        self._thread.submit(self._run_next)
        return await thread_result(work)

    def others_wait(self, tenant: Tenant) -> bool:
        """Whether a step of another tenant has not begun."""
        with self._lock:
            return any(of != tenant and not work.cancelled() for of, work, _ in self._steps)

    def post(self, step: Callable[[], None]) -> None:
        """Runs a short ``step`` of no job's on the device thread, soon. Raises ``RuntimeError`` once it is closed."""

        def guarded() -> None:
            try:
                step()
            except Exception:
                log.exception("a step of the device thread failed")

        self._thread.submit(guarded)

    def _run_next(self) -> None:
        """In the device thread: once for each step, whichever is next."""
        with self._lock:
            self._steps = [step for step in self._steps if not step[1].cancelled()]
            if not self._steps:
                return
            tenant, work, begin = self._steps.pop(self._rotation.order([step[0] for step in self._steps])[0])
            self._rotation.served(tenant)
        if not work.set_running_or_notify_cancel():
            return
        try:
            work.set_result(begin())
        except BaseException as error:
            work.set_exception(error)

    def drop(self) -> None:
        """Drops steps that have not begun."""
        with self._lock:
            steps, self._steps = self._steps, []
        for _, work, _ in steps:
            work.cancel()

    def close(self) -> None:
        """Drops steps that have not begun, and waits for the one that has."""
        self.drop()
        self._thread.shutdown(wait=True)
        self.drop()


async def thread_result(work: Future[T]) -> T:
    """The result of what a thread was given. Cancelled, it takes back what has not begun, else waits for its end."""
    waiting = asyncio.wrap_future(work)
    try:
        return await asyncio.shield(waiting)
    except asyncio.CancelledError:
        if not work.cancel():
            await asyncio.wait([waiting])
        raise


async def all_ended(futures: Iterable[Future[Any]], timeout_s: float) -> bool:
    """Waits until all have ended, however; False if that takes longer. They go on when who waits is cancelled."""
    waiting = [asyncio.wrap_future(each) for each in futures if not each.done()]
    for each in waiting:
        each.add_done_callback(lambda ended: ended.cancelled() or ended.exception())  # seen: it is others' to act on
    if not waiting:
        return True
    return not (await asyncio.wait(waiting, timeout=max(0.0, timeout_s)))[1]
