"""The device thread: admits requests, fills their chunks, runs forwards, hands out tokens.

One loop owns the pool, the resident chunks and every sequence; nothing else touches them. Others talk to it
through an inbox of callables, run between steps. A pass of the loop:

    inbox -> admit -> prefill (a piece at most, every few steps) -> one decode step -> deliver events

    waiting --admit--> filling --KV there--> ready --prefill--> running --> done
               |          loader threads        |     pieces        |  one row a step
               pages reserved                   chunks that bypass the caches, or that the store cannot take

Who is admitted and when a piece runs is decided in ``line.py``.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections import deque
from collections.abc import Callable
from functools import partial

from chunk_store.key import ModelIdentity
from chunk_store.tenant import DEFAULT_TENANT, Tenant
from decode_service import request_log
from decode_service.admission import Admission, Admitted
from decode_service.decoding import Decoding, NextToken
from decode_service.kv_source.fills import Fills
from decode_service.kv_source.store_source import StoreSource
from decode_service.line import FillRoom, Line, Turns
from decode_service.metrics import DecodeMetrics
from decode_service.prompt.request_chunk import RequestChunk
from decode_service.sequence import Event, Failed, Finished, FinishReason, Load, Sequence, Tokens
from engine.kv.resident import ResidentChunks
from engine.plan import PlacedChunk
from engine.run.pieces import prefill_chunk_piece, prefill_piece
from engine.run.protocol import Runner
from engine.sampling.params import Choice
from serving.errors import InternalFault, Overloaded, Unavailable
from serving.tenancy.places import PlacesFull, TenantPlaces
from serving.tenancy.quotas import TenantQuotas
from serving.trace.request_id import NO_REQUEST, bearing

log = logging.getLogger(__name__)

IDLE_WAIT_S = 0.5
RETRY_AFTER_S_MIN, RETRY_AFTER_S_MAX = 0.5, 30.0  # what a refused request is told


class DecodeWorker:
    """Runs sequences to their end. ``submit``, ``end``, ``call`` and ``load`` may be called from any thread."""

    def __init__(
        self,
        runner: Runner,
        residents: ResidentChunks,
        source: StoreSource,
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
        self.eos_token_ids = eos_token_ids
        self.batch_max = batch_max
        self.waiting_max = waiting_max
        pool = residents.pool
        room = FillRoom(batch_max, chunk_pages=pool.chunk_pages, tail_pages=pool.pages - pool.chunk_pages)
        self._admission = Admission(residents, room, host_nbytes=host_nbytes)
        self._decoding = Decoding(runner, residents, metrics)
        self._source = source
        self._on_failure = on_failure
        self._inbox: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self.places = TenantPlaces(waiting_max, quotas or TenantQuotas())  # in the queue and behind it
        self._line = Line(self.places.may_run)
        self._line_moved = False  # whether somebody may fit who did not before
        self._turns = Turns(runner.piece_tokens)
        self._fills = Fills(source, self._admission, self._inbox.put, end=self._end, requeue=self._requeue)
        self._ready: deque[Admitted] = deque()
        self._running: list[Sequence] = []
        self._outbox: list[tuple[Sequence, Event]] = []
        self._stopping = False
        self._ended_because = ""  # guarded by the lock, as is the order of what enters the inbox
        self._last_wait_ns = 0
        self._lock = threading.Lock()
        self._thread = threading.Thread(target=self._loop, name="cairn-device", daemon=True)

    @property
    def model(self) -> ModelIdentity:
        return self._source.model

    # -- from any thread ----------------------------------------------------------------------------
    def start(self) -> None:
        self._thread.start()

    def stop(self, *, timeout_s: float = 10.0) -> None:
        """Aborts what is left and ends the device thread."""
        self._inbox.put(self._stop)
        self._thread.join(timeout_s)
        self._fills.stop()

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
        sequence.clock.submitted = time.monotonic_ns()
        with self._lock:
            self._put(lambda: self._line.add(sequence))

    def end(self, request_id: str, reason: FinishReason, owner: Tenant = DEFAULT_TENANT) -> None:
        """Ends an owner's request; its caller gets ``Finished(reason)``. One that has ended is ignored."""
        self._inbox.put(lambda: self._end_by_id(owner, request_id, reason))

    def check_size(self, sequence: Sequence) -> None:
        """Raises ``Unsupported`` if the pool could never hold the sequence."""
        self._admission.check_size(sequence)

    def call(self, function: Callable[[], None]) -> None:
        """Runs ``function`` in the device thread between two steps. Raises ``Unavailable`` once that has ended."""
        with self._lock:
            self._put(function)

    def _put(self, function: Callable[[], None]) -> None:
        if self._ended_because:
            raise Unavailable(self._ended_because)
        self._inbox.put(function)

    def load(self) -> Load:
        """A snapshot, possibly one step old."""
        active = len(self._running) + len(self._ready) + len(self._fills)
        return Load(active, self.places.waiting, len(self.residents), self.residents.pool.count())

    # -- the loop -----------------------------------------------------------------------------------
    def _loop(self) -> None:
        try:
            while not self._stopping:
                self._pass()
        except Exception as error:  # broken bookkeeping: nothing that is in the pool can be trusted any more
            log.critical("the device thread has ended", exc_info=error)
            self._close("the device thread has ended after a fault; restart the decode service")
            fault = InternalFault(f"the device thread has ended ({type(error).__name__})", remedy="see its log")
            self._abandon_all(Failed(fault))
            self._on_failure()
        else:
            self._close("the decode service is shutting down")
            self._abandon_all(Failed(Unavailable("the decode service is shutting down")))

    def _pass(self) -> None:
        self._take_inbox()
        self._admit()
        if self._ready and self._turns.may_prefill(decoding=bool(self._running)):
            self._guarded(self._drain, list(self._running))
            self._turns.prefilled(self._prefill_some())
        if self._running:
            self._guarded(self._decode_step, list(self._running))
            self._turns.stepped()
        self._deliver()

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

    def _abandon_all(self, failure: Failed) -> None:
        """Tells every caller; the pool is left as it is."""
        for sequence in self._everyone():
            if not sequence.done:
                sequence.done = True
                sequence.clock.finished = time.monotonic_ns()
                self.metrics.ended(sequence, failure)
                request_log.ended(sequence, failure)
                self._outbox.append((sequence, failure))
        self._deliver()

    def _take_inbox(self) -> None:
        """Runs what the inbox holds; waits for something if there is no work."""
        idle = not (self._running or self._ready)
        try:
            while True:
                self._inbox.get(block=idle, timeout=IDLE_WAIT_S if idle else None)()
                idle, self._line_moved = False, True
        except queue.Empty:
            return

    def _guarded(self, step: Callable[[], int], involved: list[Sequence]) -> int:
        """Runs a step and returns its rows; an unexpected error ends the requests involved, not the service."""
        try:
            return step()
        except Exception as error:  # anything a forward can raise: out of memory, a kernel's failure
            with bearing(involved[0].request_id if len(involved) == 1 else NO_REQUEST):
                log.exception("a step failed; %d requests end with it", len(involved))
            fault = InternalFault(f"a forward failed ({type(error).__name__})", remedy="see the log")
            for sequence in involved:
                self._end(sequence, Failed(fault))
            return 0

    def _stop(self) -> None:
        self._stopping = True

    def _everyone(self) -> list[Sequence]:
        ready = (entry.sequence for entry in self._ready)
        return [*self._line, *self._fills.sequences, *ready, *self._running]

    def _end_by_id(self, owner: Tenant, request_id: str, reason: FinishReason) -> None:
        for sequence in self._everyone():
            if (sequence.owner, sequence.request_id) == (owner, request_id):
                self._end(sequence, Finished(reason))

    # -- admission ----------------------------------------------------------------------------------
    def _admit(self) -> None:
        """Takes waiting requests in while there are places to decode; one that waits for KV takes none of them."""
        self._ready += self._fills.take_ready(self._places())
        self._admission.room.asks_wait = self._line.asks
        while self._line_moved and self._places() > self._fills.filled:
            admitted = self._line.next(self._admission.admit)
            if admitted is None:
                self._line_moved = False
                return
            self.places.admit(admitted.sequence.tenant)
            clock = admitted.sequence.clock
            clock.admitted = time.monotonic_ns()
            self._last_wait_ns = clock.admitted - clock.submitted
            request_log.admitted(admitted.sequence, len(admitted.wanted))
            self._fills.begin(admitted)
            self._ready += self._fills.take_ready(self._places())

    def _places(self) -> int:
        """How many more could decode."""
        return self.batch_max - len(self._running) - len(self._ready)

    def _requeue(self, sequence: Sequence) -> None:
        """Puts a request back into the queue that has to be admitted again."""
        self._line.put_back(sequence)
        self._line_moved = True
        self.places.put_back(sequence.tenant)

    # -- forwards -----------------------------------------------------------------------------------
    def _prefill_some(self) -> int:
        """Forwards over requests' own tokens, at least one piece and at most a piece's worth of rows; the rows."""
        done = 0
        while self._ready:
            entry = self._ready[0]
            if entry.sequence.done:
                self._ready.popleft()
                self._fills.give_up(entry)
                continue
            if done and done + self._rows_next(entry) > self.runner.piece_tokens:
                break
            chunk = entry.sequence.to_compute
            work = partial(self._prefill_piece, entry) if chunk is None else partial(self._compute_piece, entry, chunk)
            done += self._guarded(work, [entry.sequence])
            self._deliver()  # a first token waits neither for the others' first tokens nor for their step
        return done

    def _rows_next(self, entry: Admitted) -> int:
        """Rows of the next piece that an entry needs."""
        sequence = entry.sequence
        chunk = sequence.to_compute
        if chunk is not None and chunk.computed is not None:
            tokens = len(chunk.token_ids) - chunk.computed
        else:
            tokens = len(sequence.composition.tail) - sequence.tail_tokens
        return min(self.runner.piece_tokens, tokens)

    def _compute_piece(self, entry: Admitted, chunk: RequestChunk) -> int:
        """A piece of the next chunk that is computed here: for this request alone, or because nobody could store it."""
        sequence, rows, resident = entry.sequence, self._rows_next(entry), chunk.held
        assert chunk.computed is not None
        page_size = self.runner.pool.page_size
        context = [
            PlacedChunk(before.first_slot(page_size), before.tokens, 0)
            for before in (sequence.composition.chunks[index].held for index in chunk.context)
        ]
        prefill_chunk_piece(self.runner, chunk.token_ids, chunk.computed, context, resident.run)
        chunk.computed += rows
        if chunk.computed == len(chunk.token_ids):
            if sequence.bypass:
                resident.ready = True
            else:
                self._admission.filled(entry, chunk)
        return rows

    def _prefill_piece(self, entry: Admitted) -> int:
        sequence = entry.sequence
        tail = sequence.composition.tail
        placed = sequence.placed(self.runner.pool.page_size, self.residents.moves)
        start = sequence.composition.tail_start
        step = prefill_piece(self.runner, tail, sequence.tail_tokens, placed, sequence.tail_pages, start=start)
        rows = self._rows_next(entry)
        sequence.tail_tokens += rows
        if sequence.tail_tokens == len(tail):
            choice = sequence.sampler.choose(step.logits()[0].cpu())  # waits for the device: only now is there a token
            self._ready.popleft()
            self._running.append(sequence)
            sequence.clock.first_token = time.monotonic_ns()
            self.metrics.prefilled(sequence)
            request_log.first_token(sequence)
            self._take_token(sequence, choice)
        return rows

    def _decode_step(self) -> int:
        """One token for every running sequence, as they come."""
        return self._choose_all(self._decoding.step(self._running))

    def _drain(self) -> int:
        """Takes the tokens that are on their way: what a prefill runs must not come between two launched steps."""
        return self._choose_all(self._decoding.drain())

    def _choose_all(self, tokens: list[NextToken]) -> int:
        for token in tokens:
            self._guarded(partial(self._choose, token), [token.sequence])
        return len(tokens)

    def _choose(self, token: NextToken) -> int:
        if not token.sequence.done:
            self._take_token(token.sequence, token.choose())
        return 1

    # -- tokens and ends ----------------------------------------------------------------------------
    def _take_token(self, sequence: Sequence, choice: Choice) -> None:
        sequence.generated.append(choice.token_id)
        self._outbox.append((sequence, Tokens((choice,))))
        params = sequence.params
        stops = choice.token_id in params.stop_token_ids
        stops |= not params.ignore_eos and choice.token_id in self.eos_token_ids
        if stops and len(sequence.generated) >= params.min_tokens:
            self._end(sequence, Finished(FinishReason.STOP))
        elif len(sequence.generated) >= params.max_tokens:
            self._end(sequence, Finished(FinishReason.LENGTH))

    def _end(self, sequence: Sequence, event: Finished | Failed) -> None:
        """Ends a sequence wherever it stands and gives back all it holds. Harmless a second time."""
        if sequence.done:
            return
        sequence.done = True
        sequence.clock.finished = time.monotonic_ns()
        self._admission.release(sequence)
        if sequence in self._line:
            self._line.remove(sequence)
            self.places.leave(sequence.tenant)
        else:
            self.places.end(sequence.tenant)
        if sequence in self._running:
            self._running.remove(sequence)
        self._line_moved = True
        self.metrics.ended(sequence, event)
        request_log.ended(sequence, event)
        self._outbox.append((sequence, event))

    def _deliver(self) -> None:
        """Hands the pass's events to their callers, one call a request."""
        events: dict[int, tuple[Sequence, list[Event]]] = {}
        for sequence, event in self._outbox:
            events.setdefault(id(sequence), (sequence, []))[1].append(event)
        self._outbox.clear()
        for sequence, batch in events.values():
            sequence.deliver(batch)
