"""The device thread: tells the scheduler what happens, runs what it plans, hands out tokens.

One loop owns the scheduler, the pool and every sequence; nothing else touches them. Others talk to it through an inbox
of callables, run between launches. A pass of the loop:

    inbox (events) -> plan -> start loads -> run pieces of prefill, or a decode step -> deliver what came of it

What runs when is decided in ``scheduler.py``; here is how.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable
from collections.abc import Sequence as Items
from functools import partial

from chunk_store.key import ModelIdentity
from chunk_store.tenant import DEFAULT_TENANT, Tenant
from decode_service import request_log
from decode_service.decoding import Begun, Decoding, NextToken
from decode_service.kv_source.fetcher import KVFetcher
from decode_service.kv_source.loader import Loader
from decode_service.metrics import DecodeMetrics
from decode_service.scheduler import Scheduler
from decode_service.sequence import Deliveries, FinishReason, Occupancy, Sequence, Tokens, hand_out
from decode_service.step_plan import Rows, StepPlan
from engine.kv.host_tier import PoolMemory
from engine.kv.resident import ResidentChunks
from engine.plan import PlacedChunk
from engine.run.pieces import prefill_chunk_piece, prefill_piece
from engine.run.protocol import Runner
from serving.errors import InternalFault, Overloaded, RequestError, Unavailable
from serving.tenancy.places import PlacesFull, TenantPlaces
from serving.tenancy.quotas import TenantQuotas
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
        quotas: TenantQuotas | None = None,
        host_nbytes: int = 0,
        on_failure: Callable[[], None] = lambda: None,
    ) -> None:
        """``on_failure`` is called from the device thread when it ends because of a fault.

        ``host_nbytes`` of pinned host memory keep KV that was loaded to a device.
        """
        self.runner = runner
        self.residents = residents
        self.metrics = metrics
        self.batch_max = batch_max
        self.waiting_max = waiting_max
        self.model: ModelIdentity = source.model
        self.places = TenantPlaces(waiting_max, quotas or TenantQuotas())  # in the queue and behind it
        self.scheduler = Scheduler(
            *(residents, self.places),
            eos_token_ids=eos_token_ids,
            batch_max=batch_max,
            piece_tokens=runner.piece_tokens,
        )
        self._inbox: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        memory = PoolMemory(residents.pool, host_nbytes=host_nbytes)
        self.loader = Loader(source, memory, self.scheduler, self._inbox.put, threads=self.scheduler.loads_max)
        self._decoding = Decoding(runner, residents, metrics, self._begun)
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

    def take_place(self, tenant: Tenant = DEFAULT_TENANT) -> None:
        """A place in the queue for a request that is about to be composed, until ``submit`` or ``leave_place``.

        Costs next to nothing, so that a request which finds no place is refused before anything is done for it.
        Raises ``Overloaded`` if ``waiting_max`` have one already, or the tenant has as many as it may.
        """
        try:
            self.places.take(tenant)
        except PlacesFull as error:
            raise Overloaded(str(error), retry_after_s=self._wait_s()) from error

    def leave_place(self, tenant: Tenant = DEFAULT_TENANT) -> None:
        """Gives a place back that nothing was submitted to."""
        self.places.leave(tenant)

    def _wait_s(self) -> float:
        """How long whoever was admitted last had waited, within reason: what a new one must expect."""
        return min(max(self._last_wait_ns / 1e9, RETRY_AFTER_S_MIN), RETRY_AFTER_S_MAX)

    def submit(self, sequence: Sequence) -> None:
        """Queues a sequence, whose place was taken before. Raises ``Unavailable`` once the device thread has ended;
        it keeps its place then."""
        self.call(partial(self.scheduler.submit, sequence, time.monotonic_ns()))

    def end(self, request_id: str, reason: FinishReason, owner: Tenant = DEFAULT_TENANT) -> None:
        """Ends an owner's request; its caller gets ``Finished(reason)``. One that has ended is ignored."""
        self._inbox.put(partial(self.scheduler.end, owner, request_id, reason, time.monotonic_ns()))

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
        decoding = self.scheduler.decoding
        if plan.pieces:
            self._guarded(self._drain, decoding)
            for rows in plan.pieces:
                self._guarded(partial(self._prefill, rows), [rows.sequence])
                self._deliver()  # a first token waits neither for the others' first tokens nor for their step
        else:
            self._guarded(partial(self._decode, plan.decodes), decoding)
        self._deliver()

    def _take_inbox(self) -> None:
        """Runs what the inbox holds; waits for something if there is no work."""
        idle = not self.scheduler.busy
        try:
            while True:
                self._inbox.get(block=idle, timeout=IDLE_WAIT_S if idle else None)()
                idle = False
        except queue.Empty:
            return

    def _start(self, plan: StepPlan) -> None:
        if plan.evicted:
            log.debug("%d chunks left the pool", len(plan.evicted))
        for fill in plan.admitted:
            clock = fill.sequence.clock
            self._last_wait_ns = clock.admitted - clock.submitted
            request_log.admitted(fill.sequence, len(fill.chunks))
        for fill in plan.loads:
            self.loader.start(fill)

    def _guarded(self, step: Callable[[], None], involved: list[Sequence]) -> None:
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
    def _prefill(self, rows: Rows) -> None:
        """A piece of a prompt, or of a chunk that is computed here."""
        sequence = rows.sequence
        if sequence.done:  # a piece before this one failed
            return
        if rows.chunk is not None:
            self._compute(rows)
            return
        composition = sequence.composition
        placed = sequence.placed(self.residents.pool.page_size, self.residents.moves)
        step = prefill_piece(
            *(self.runner, composition.tail, rows.first, placed, sequence.tail_pages), start=composition.tail_start
        )
        self.scheduler.ran([rows])
        if rows.last_of_prompt:
            choice = sequence.sampler.choose(step.logits()[0].cpu())  # waits for the device: only now is there a token
            self.scheduler.token(sequence, choice, time.monotonic_ns())
            self.metrics.prefilled(sequence)
            request_log.first_token(sequence)

    def _compute(self, rows: Rows) -> None:
        """For this request alone, or because nobody could store it."""
        chunk, page_size = rows.chunk, self.residents.pool.page_size
        assert chunk is not None
        before = [rows.sequence.composition.chunks[index].held for index in chunk.context]
        context = [PlacedChunk(each.first_slot(page_size), each.tokens, 0) for each in before]
        prefill_chunk_piece(self.runner, chunk.token_ids, rows.first, context, chunk.held.run)
        self.scheduler.ran([rows])

    def _decode(self, rows: Items[Rows]) -> None:
        """One token for every running sequence, as they come."""
        self._take(self._decoding.step(rows))

    def _begun(self, begun: Begun) -> None:
        self.scheduler.ran(begun.rows, begun.step.plan)

    def _drain(self) -> None:
        """Takes the tokens that are on their way: what a prefill runs must not come between two launched steps."""
        self._take(self._decoding.drain())

    def _take(self, tokens: list[NextToken]) -> None:
        for token in tokens:
            self._guarded(partial(self._choose, token), [token.sequence])

    def _choose(self, token: NextToken) -> None:
        if not token.sequence.done:
            self.scheduler.token(token.sequence, token.choose(), time.monotonic_ns())

    def _deliver(self) -> None:
        """Hands what has happened to the callers, in one call for all of them."""
        events: Deliveries = {}
        for sequence, event in self.scheduler.take_events():
            events.setdefault(sequence, []).append(event)
            if not isinstance(event, Tokens):
                self.metrics.ended(sequence, event)
                request_log.ended(sequence, event)
        if events:
            self._hand_over(events)
