"""The device thread: tells the scheduler what happens, runs what it plans, hands out tokens.

One loop owns the scheduler, the pool and every sequence; nothing else touches them. Others talk to it through an inbox
of callables, run between launches. A pass of the loop:

    inbox (events) -> plan -> start loads -> begin what is planned -> read the step before it -> deliver its tokens

Where the device runs by itself, step n + 1 is begun before the tokens of step n are read, whoever joins or leaves and
however tokens are drawn; elsewhere a step is read at once.

    host     begin 1 | begin 2, read 1, deliver 1 | begin 3, read 2, deliver 2 | ...
    device   ....... step 1 ............ step 2 ............ step 3

A sequence that ends with token n (a stop token, an abort) is in step n + 1 already: what that step gives it is dropped.
Its pages and its slot may have a new owner by then; the owner's writes come later on the same stream.

A step of answers that follow a grammar begins its forward alike; it draws once the step before it was read and masks
say which tokens may come (``masks.py``), which takes less than the forward.

What runs when is decided in ``scheduler.py``; here is how.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections import deque
from collections.abc import Callable
from collections.abc import Sequence as Items
from functools import partial

from chunk_store.key import ModelIdentity
from chunk_store.tenant import DEFAULT_TENANT, Tenant
from decode_service import request_log
from decode_service.answer_end import grammar_failed
from decode_service.begun import Begun, begin, sequences_of
from decode_service.kv_source.fetcher import KVFetcher
from decode_service.kv_source.loader import Loader
from decode_service.masks import Masks, StepMasks
from decode_service.metrics import DecodeMetrics
from decode_service.scheduler import Scheduler
from decode_service.sequence import Deliveries, Failed, Finished, FinishReason, Occupancy, Sequence, hand_out
from decode_service.step_plan import Rows, StepPlan
from decode_service.tails import TailMove
from engine.kv.host_tier import PoolMemory
from engine.kv.resident import ResidentChunks
from engine.kv.tails_aside import TailsAside
from engine.run.protocol import Runner
from engine.sampling.params import Choice
from engine.sight import EVERYTHING, Sight
from serving.errors import InternalFault, InvalidRequest, Overloaded, RequestError, Unavailable
from serving.tenancy.places import PlacesFull, TenantPlaces
from serving.tenancy.quotas import TenantQuotas
from serving.tenancy.waits import Waits
from serving.trace.request_id import NO_REQUEST, bearing

log = logging.getLogger(__name__)

IDLE_WAIT_S = 0.5
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
        self._aside = TailsAside(residents.pool, aside_nbytes)
        self.scheduler = Scheduler(
            *(residents, self.places, runner),
            eos_token_ids=eos_token_ids,
            batch_max=batch_max,
            aside=self._aside.table,
            sight=sight,
        )
        self._inbox: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        memory = PoolMemory(residents.pool, host_nbytes=host_nbytes)
        self.loader = Loader(source, memory, self.scheduler, self._inbox.put, threads=self.scheduler.loads_max)
        self._in_flight: deque[Begun] = deque()
        self._unread_max = 1 if runner.runs_ahead else 0
        self._masks = Masks(runner)
        self._on_failure = on_failure
        self._hand_over: Callable[[Deliveries], None] = hand_out
        self._stopping = False
        self._ended_because = ""  # guarded by the lock, as is the order of what enters the inbox
        self._last_wait_ns = 0
        self._lock = threading.Lock()
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
        self._masks.stop()

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
        with self._lock:
            if self._ended_because:
                raise Unavailable(self._ended_because)
            self._inbox.put(function)

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
            self._close("the device thread has ended after a fault; restart the decode service")
            self._abandon(InternalFault(f"the device thread has ended ({type(error).__name__})", remedy="see its log"))
            self._on_failure()
        else:
            self._close("the decode service is shutting down")
            self._abandon(Unavailable("the decode service is shutting down"))

    def _pass(self) -> None:
        self._take_inbox()
        plan = self.scheduler.plan(time.monotonic_ns())
        self._start(plan)
        for piece in plan.alone:
            self._run([piece])
        if plan.packed:
            self._run(plan.packed)
        if not plan.rows:
            self._read(unread_max=0)
        self._deliver()

    def _take_inbox(self) -> None:
        """Runs what the inbox holds; waits for something if there is no work."""
        idle = not self.scheduler.busy and not self._in_flight
        try:
            while True:
                self._inbox.get(block=idle, timeout=IDLE_WAIT_S if idle else None)()
                idle = False
        except queue.Empty:
            return

    def _start(self, plan: StepPlan) -> None:
        if plan.evicted:
            log.debug("%d chunks left the pool", len(plan.evicted))
        self.metrics.gave_back(plan.given_back)
        for sequence, why in self.scheduler.take_gave_way():
            self.metrics.gave_way(why)
            request_log.gave_way(sequence, why)
        for move in plan.moves:
            self._guarded(partial(self._move, move), [move.sequence])
        for fill in plan.admitted:
            clock = fill.sequence.clock
            if not fill.sequence.preemptions:
                self._last_wait_ns = clock.admitted - clock.submitted
            request_log.admitted(fill.sequence, len(fill.chunks))
        for fill in plan.loads:
            self.loader.start(fill)
        for sequence in plan.opened:
            self._guarded(partial(self.runner.open, sequence.slot, sequence.sampling_now), [sequence])

    def _move(self, move: TailMove) -> None:
        """Behind all that was launched, before anything is launched for whoever has the pages now."""
        if move.back:
            self._aside.bring_back(move.run, move.pages)
        else:
            self._aside.put(move.pages, move.run)

    def _guarded(self, step: Callable[[], None], involved: Items[Sequence]) -> None:
        """Runs a step; an unexpected error ends the requests involved, not the service."""
        try:
            step()
        except Exception as error:  # anything a forward can raise: out of memory, a kernel's failure
            with bearing(involved[0].request_id if len(involved) == 1 else NO_REQUEST):
                log.exception("a step failed; %d requests end with it", len(involved))
            fault = InternalFault(f"a forward failed ({type(error).__name__})", remedy="see the log")
            for sequence in involved:
                self.scheduler.fail(sequence, fault, time.monotonic_ns())

    def _stop(self) -> None:
        self._stopping = True

    def _close(self, because: str) -> None:
        """From here on nothing enters the inbox; what is in it, requests among it, is taken out."""
        with self._lock:
            self._ended_because = because
        while True:
            try:
                self._inbox.get_nowait()()
            except queue.Empty:
                return
            except Exception:
                log.exception("a last call failed")

    def _abandon(self, error: RequestError) -> None:
        """Tells every caller."""
        self.scheduler.abandon(error, time.monotonic_ns())
        self._deliver()

    # -- forwards -----------------------------------------------------------------------------------
    def _run(self, planned: Items[Rows]) -> None:
        """Begins a step, then reads what was begun before it."""
        rows = [each for each in planned if not each.sequence.done]  # a piece before this one may have failed
        if rows:
            self._guarded(partial(self._begin, rows), sequences_of(rows))
        self._read(unread_max=self._unread_max)

    def _begin(self, rows: Items[Rows]) -> None:
        told = [sequence for each in rows for sequence in each.masked]
        if not self.runner.runs_ahead:  # all that was drawn is read
            self._jump(rows)
        masks = self._masks.of(told) if told else None
        begun = begin(self.runner, rows, self.residents, self.sight)
        self._in_flight.append(begun)
        self.scheduler.ran(rows, begun.step.plan)
        if masks is not None:
            self._tell(begun, masks)

    def _tell(self, begun: Begun, masks: StepMasks) -> None:
        """Lets a step draw whose forward runs: which tokens may come follows from the step before it."""
        self._read(unread_max=1, deliver=False)
        self._jump(begun.rows)
        try:
            for sequence, error in masks.fill():
                self.scheduler.fail(sequence, grammar_failed(error), time.monotonic_ns())
            begun.step.draw(masks.bits)
        except BaseException:
            self._in_flight.remove(begun)  # there will be nothing to read
            raise

    def _jump(self, rows: Items[Rows]) -> None:
        """Tokens that are forced are known, and have rows: their answers have them."""
        for each in rows:
            for token_id in each.forced:
                if not each.sequence.done:
                    self.scheduler.token(each.sequence, Choice(token_id, None), time.monotonic_ns())
                    self.metrics.forced()

    def _read(self, *, unread_max: int, deliver: bool = True) -> None:
        """Takes the tokens of all steps but the last ``unread_max``, and hands them out unless that can wait."""
        while len(self._in_flight) > unread_max:
            begun = self._in_flight.popleft()
            self._guarded(partial(self._take, begun), begun.sequences)
            if deliver:
                self._deliver()

    def _take(self, begun: Begun) -> None:
        """One token for everybody who decodes in a step, or whose prompt ended there."""
        tokens = begun.wait()
        begun.note_scores()
        if begun.decodes:
            decoding = [rows.sequence for rows, choice in tokens if rows.decodes and choice.token_id >= 0]
            self.metrics.stepped(begun.step.plan.seen_through(self.sight.widest), begun.tokens_flat, decoding)
        for rows, choice in tokens:
            self._token(rows, choice)

    def _token(self, rows: Rows, choice: Choice) -> None:
        sequence = rows.sequence
        if choice.token_id < 0:
            with bearing(sequence.request_id):
                log.error("the model gave NaN, or -inf for every token")
            fault = InternalFault("a forward failed (ArithmeticError)", remedy="see the log")
            self.scheduler.fail(sequence, fault, time.monotonic_ns())
            return
        self.scheduler.token(sequence, choice, time.monotonic_ns())
        if rows.last_of_prompt:
            self.metrics.prefilled(sequence)
            request_log.first_token(sequence)

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
