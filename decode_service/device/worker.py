"""The device thread: tells the scheduler what happens, runs what it plans, hands out tokens.

One loop owns the scheduler, the pool and every sequence; nothing else touches them. Others talk to it through an inbox
of callables (``inbox.py``), run between launches. A pass of the loop:

    inbox (events) -> plan -> start loads -> begin what is planned -> read the step before it -> deliver its tokens

What runs when is decided in ``scheduler.py``; ``launches.py`` begins it and reads its tokens.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from functools import partial

from chunk_store.key import ModelIdentity
from chunk_store.tenant import DEFAULT_TENANT, Tenant
from decode_service.device.inbox import Inbox
from decode_service.device.launches import Launches
from decode_service.kv_source.fetcher import KVFetcher
from decode_service.kv_source.loader import Loader
from decode_service.metrics import DecodeMetrics
from decode_service.scheduling import request_log
from decode_service.scheduling.scheduler import Scheduler
from decode_service.scheduling.sequence import Deliveries, Failed, Finished, FinishReason, Occupancy, Sequence, hand_out
from decode_service.scheduling.step_plan import StepPlan
from engine.kv.host_tier import PoolMemory
from engine.kv.resident import ResidentChunks
from engine.kv.tails_aside import TailsAside
from engine.run.protocol import Runner
from engine.sight import EVERYTHING, Sight
from serving.errors import InternalFault, InvalidRequest, Overloaded, RequestError, Unavailable
from serving.tenancy.places import PlacesFull, TenantPlaces
from serving.tenancy.quotas import TenantQuotas
from serving.tenancy.waits import Waits

log = logging.getLogger(__name__)

RETRY_AFTER_S_MIN, RETRY_AFTER_S_MAX = 0.5, 30.0  # what a refused request is told


class DecodeWorker:
    """Runs sequences to their end. ``submit``, ``end``, ``call`` and ``occupancy`` may be called from any thread."""

    def __init__(
        self,
        runner: Runner,
        residents: ResidentChunks,
        source: KVFetcher,
        metrics: DecodeMetrics,
        *,
        eos_token_ids: frozenset[int],
        batch_max: int = 32,
        waiting_max: int = 256,
        waiting_max_s: float | None = None,
        quotas: TenantQuotas | None = None,
        host_nbytes: int = 0,
        aside_nbytes: int = 0,
        sight: Sight = EVERYTHING,
        on_failure: Callable[[], None] = lambda: None,
    ) -> None:
        """``on_failure`` is called from the device thread when it ends because of a fault.

        ``host_nbytes`` of pinned host memory keep KV that was loaded to a device, ``aside_nbytes`` tails that gave up
        their pages. ``sight``: what the model's rows see. Raises ``ValueError`` for a larger ``batch_max`` than the
        runner has slots to draw in.
        """
        if batch_max > runner.slots:
            raise ValueError(f"batch-max: {batch_max} requests need as many slots, the runner has {runner.slots}")
        self.runner = runner
        self.residents = residents
        self.metrics = metrics
        self.sight = sight
        self.batch_max = batch_max
        self.waiting_max = waiting_max
        self.model: ModelIdentity = source.model
        waits = Waits(batch_max)  # of those in the queue, and behind it
        self.places = TenantPlaces(waiting_max, quotas or TenantQuotas(), waiting_max_s, waits)
        aside = TailsAside(residents.pool, aside_nbytes)
        self.scheduler = Scheduler(
            *(residents, self.places, runner),
            eos_token_ids=eos_token_ids,
            batch_max=batch_max,
            aside=aside.table,
            sight=sight,
        )
        self._inbox = Inbox()
        memory = PoolMemory(residents.pool, host_nbytes=host_nbytes)
        self.loader = Loader(source, memory, self.scheduler, self._inbox.put, threads=self.scheduler.loads_max)
        self._launches = Launches(runner, residents, aside, self.scheduler, metrics, sight, self._deliver)
        self._on_failure = on_failure
        self._hand_over: Callable[[Deliveries], None] = hand_out
        self._stopping = False
        self._last_wait_ns = 0
        self._thread = threading.Thread(target=self._loop, name="cairn-device", daemon=True)

    # -- from any thread ----------------------------------------------------------------------------
    def start(self, deliver: Callable[[Deliveries], None] = hand_out) -> None:
        """``deliver`` is given, in the device thread, what a step has for all callers together."""
        self._hand_over = deliver
        self._thread.start()

    def stop(self, *, timeout_s: float = 10.0) -> None:
        """Aborts what is left and ends the device thread."""
        self._inbox.put(self._stop)
        self._thread.join(timeout_s)
        self.loader.stop()
        self._launches.stop()

    def take_place(self, tenant: Tenant = DEFAULT_TENANT, answers: int = 1) -> None:
        """A place in the queue for each answer of a request that is about to be composed, until ``submit`` or
        ``leave_place``.

        Costs next to nothing, so that a request which finds no place is refused before anything is done for it.
        Raises ``Overloaded`` if ``waiting_max`` have one already, if its turn would not come within ``waiting_max_s``,
        or if the tenant has as many as it may, and
        ``InvalidRequest`` for more answers than it may ever have.
        """
        if answers > (most := self.places.most(tenant)) > 0:
            raise InvalidRequest(f"{answers} answers at once; the caller may have {most}", field="sampling.n")
        try:
            self.places.take(tenant, answers)
        except PlacesFull as error:
            raise Overloaded(str(error), retry_after_s=self._wait_s()) from error

    def leave_place(self, tenant: Tenant = DEFAULT_TENANT) -> None:
        """Gives a place back that nothing was submitted to."""
        self.places.leave(tenant)

    def _wait_s(self) -> float:
        """How long whoever was admitted last had waited, within reason: what a new one must expect."""
        return min(max(self._last_wait_ns / 1e9, RETRY_AFTER_S_MIN), RETRY_AFTER_S_MAX)

    def submit(self, *sequences: Sequence) -> None:
        """Queues sequences together, whose places were taken before. Raises ``Unavailable`` once the device thread has
        ended; they keep their places then."""
        now = time.monotonic_ns()

        def submit() -> None:
            for sequence in sequences:
                self.scheduler.submit(sequence, now)

        self.call(submit)

    def end(self, request_id: str, reason: FinishReason, owner: Tenant = DEFAULT_TENANT) -> None:
        """Ends an owner's request; its caller gets ``Finished(reason)``. One that has ended is ignored."""
        self._inbox.put(partial(self.scheduler.end, owner, request_id, reason, time.monotonic_ns()))

    def finish(self, sequence: Sequence, reason: FinishReason) -> None:
        """Ends one answer alone, as ``end`` does with all that bear a request's id."""
        self._inbox.put(lambda: self.scheduler.finish(sequence, reason, time.monotonic_ns()))

    @property
    def tail_tokens_max(self) -> int:
        """Tokens that a query and its answer can have in the pool, if nobody else has any."""
        return self.scheduler.tail_tokens_max

    def check_size(self, sequence: Sequence) -> None:
        """Raises ``Unsupported`` if the pool could never hold the sequence."""
        self.scheduler.check_size(sequence)

    def call(self, function: Callable[[], None]) -> None:
        """Runs ``function`` in the device thread between two launches. Raises ``Unavailable`` once that has ended."""
        self._inbox.call(function)

    def occupancy(self) -> Occupancy:
        """A snapshot, possibly one step old."""
        pages = self.residents.pool.count()
        return Occupancy(self.scheduler.running, self.places.waiting, len(self.residents), pages)

    # -- the loop -----------------------------------------------------------------------------------
    def _loop(self) -> None:
        try:
            while not self._stopping:
                self._pass()
        except Exception as error:  # broken bookkeeping: nothing that is in the pool can be trusted any more
            log.critical("the device thread has ended", exc_info=error)
            self._inbox.close("the device thread has ended after a fault; restart the decode service")
            self._abandon(InternalFault(f"the device thread has ended ({type(error).__name__})", remedy="see its log"))
            self._on_failure()
        else:
            self._inbox.close("the decode service is shutting down")
            self._abandon(Unavailable("the decode service is shutting down"))

    def _pass(self) -> None:
        self._inbox.run(idle=not self.scheduler.busy and not self._launches.unread)
        plan = self.scheduler.plan(time.monotonic_ns())
        self._start(plan)
        for piece in plan.alone:
            self._launches.run([piece])
        if plan.packed:
            self._launches.run(plan.packed)
        if not plan.rows:
            self._launches.read_all()
        self._deliver()

    def _start(self, plan: StepPlan) -> None:
        if plan.evicted:
            log.debug("%d chunks left the pool", len(plan.evicted))
        self.metrics.gave_back(plan.given_back)
        for sequence, why in self.scheduler.take_gave_way():
            self.metrics.gave_way(why)
            request_log.gave_way(sequence, why)
        for move in plan.moves:
            self._launches.move(move)
        for fill in plan.admitted:
            clock = fill.sequence.clock
            if not fill.sequence.preemptions:
                self._last_wait_ns = clock.admitted - clock.submitted
            request_log.admitted(fill.sequence, len(fill.chunks))
        for fill in plan.loads:
            self.loader.start(fill)
        for sequence in plan.opened:
            self._launches.open(sequence)

    def _stop(self) -> None:
        self._stopping = True

    def _abandon(self, error: RequestError) -> None:
        """Tells every caller."""
        self.scheduler.abandon(error, time.monotonic_ns())
        self._deliver()

    def _deliver(self) -> None:
        """Hands what has happened to the callers, in one call for all of them."""
        events: Deliveries = {}
        for sequence, event in self.scheduler.take_events():
            events.setdefault(sequence, []).append(event)
            if isinstance(event, Finished | Failed) and not sequence.for_chunks:  # whoever asks for chunks counts them
                self.metrics.ended(sequence, event)
                request_log.ended(sequence, event)
        if events:
            self._hand_over(events)
