"""Requests whose KV is on its way, and the loader threads that bring it.

A chunk that several requests wait for is fetched once, by the first of them. Everything here belongs to the device
thread but ``_fetch``, which runs in a loader thread and posts its outcome back.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial

from chunk_store.key import ChunkKey
from decode_service.admission import Admission, Admitted
from decode_service.kv_source.store_source import Caller, NoRoomToAsk, StoreSource
from decode_service.line import Stay
from decode_service.sequence import Failed, Sequence
from serving.errors import InternalFault, RequestError
from serving.trace.request_id import bearing
from serving.trace.stages import Stage

log = logging.getLogger(__name__)

Post = Callable[[Callable[[], None]], None]


class Fills:
    """``begin`` takes an admitted request in, ``take_ready`` gives those out whose chunks are all there.

    ``post`` runs a function in the device thread; ``end`` ends a request that cannot be filled, ``requeue`` takes
    one back that has to be admitted again.
    """

    def __init__(
        self,
        source: StoreSource,
        admission: Admission,
        post: Post,
        *,
        end: Callable[[Sequence, Failed], None],
        requeue: Callable[[Sequence], None],
    ) -> None:
        self._source = source
        self._admission = admission
        self._room = admission.room
        self._post = post
        self._end = end
        self._requeue = requeue
        self._filling: list[Admitted] = []
        self.filled = 0  # of these, those whose chunks are all there and who wait for a place to decode
        self._loaders = ThreadPoolExecutor(self._room.threads, thread_name_prefix="cairn-load")

    def __len__(self) -> int:
        return len(self._filling)

    @property
    def sequences(self) -> list[Sequence]:
        return [entry.sequence for entry in self._filling]

    def begin(self, admitted: Admitted) -> None:
        """Takes a request in and starts fetching what it wants."""
        self._filling.append(admitted)
        if admitted.wanted:
            assert admitted.stay is not None
            admitted.stay.fetching = True
            self._loaders.submit(self._fetch_bearing_id, admitted)

    def take_ready(self, places: int) -> list[Admitted]:
        """At most ``places`` requests whose chunks are all there, or are computed here; ended ones are dropped."""
        ready: list[Admitted] = []
        self.filled = 0
        for entry in list(self._filling):
            if entry.sequence.done:
                self._leave(entry)
                self.give_up(entry)
            elif (entry.stay is None or not entry.stay.fetching) and self._admission.all_ready(entry):
                if len(ready) == places:
                    self.filled += 1
                    continue
                self._leave(entry)
                entry.sequence.clock.filled = time.monotonic_ns()
                ready.append(entry)
        return ready

    def give_up(self, entry: Admitted) -> None:
        """Nobody computes what this request, which has ended, was to compute: others try for themselves."""
        if entry.filling and any(chunk.computed is not None for chunk in entry.filling):
            self._send_back(self._admission.fill_failed(entry))

    def stop(self) -> None:
        """Starts nothing more; fetches that run end by themselves."""
        self._loaders.shutdown(wait=False, cancel_futures=True)

    def _leave(self, entry: Admitted) -> None:
        self._filling.remove(entry)
        if entry.stay is not None:
            entry.stay.waiting = False
            self._room.end_if_over(entry.stay)

    # -- fetching -----------------------------------------------------------------------------------
    def _fetch_bearing_id(self, admitted: Admitted) -> None:
        with bearing(admitted.sequence.request_id):
            self._fetch(admitted)

    def _fetch(self, admitted: Admitted) -> None:
        """In a loader thread: fills an admitted request's chunks and tells the device thread."""
        sequence, stay = admitted.sequence, admitted.stay
        assert stay is not None
        filling = list(admitted.filling.values())

        def abandoned() -> bool:
            # Read from another thread: should somebody join meanwhile, it is returned to the queue.
            return sequence.done and all(chunk.holders <= 1 for chunk in filling)

        caller = Caller(sequence.salt, sequence.deadline, abandoned, partial(self._may_ask, stay))
        try:
            spent_ns = self._source.fetch(sequence.composition, admitted.wanted, caller)
        except NoRoomToAsk:
            self._post(partial(self._put_off, admitted))
        except RequestError as error:
            self._post(partial(self._failed, admitted, Failed(error)))
        except Exception as error:
            log.exception("loading KV failed")
            unexpected = Failed(InternalFault(f"loading KV failed ({type(error).__name__})", remedy="see the log"))
            self._post(partial(self._failed, admitted, unexpected))
        else:
            self._post(partial(self._fetched, admitted, spent_ns))

    def _may_ask(self, stay: Stay) -> bool:
        """Whether what a stay waits for may be computed; then its place among those that are read for is free."""
        may = self._room.may_ask(stay)
        if may:
            self._post(_look_again)
        return may

    def _fetched(self, admitted: Admitted, spent_ns: dict[Stage, int]) -> None:
        self._end_fetch(admitted)
        for want in admitted.wanted:
            if want.outcome is not None and not want.outcome.unpublished:
                self._admission.filled(admitted, want.chunk)
        if admitted in self._filling:
            admitted.sequence.clock.measured_ns.update(spent_ns)
            for want in admitted.wanted:
                want.chunk.outcome = want.outcome
                want.chunk.computed = 0 if want.chunk in admitted.filling else None
        elif admitted.filling:  # it has ended, or was returned to the queue, and nobody else can compute the rest
            self._send_back(self._admission.fill_failed(admitted))

    def _failed(self, admitted: Admitted, failure: Failed) -> None:
        """Ends the request. Those that wait for its chunks try for themselves: they have time of their own."""
        self._end_fetch(admitted)
        keys = self._admission.fill_failed(admitted)
        if admitted in self._filling:
            self._end(admitted.sequence, failure)
        self._send_back(keys)

    def _put_off(self, admitted: Admitted) -> None:
        """Its KV has to be computed, and enough requests wait for that: until one of them is done it holds nothing."""
        self._end_fetch(admitted)
        keys = self._admission.fill_failed(admitted)
        admitted.sequence.cold = True
        self._send_back(keys, also=admitted)

    def _end_fetch(self, admitted: Admitted) -> None:
        assert admitted.stay is not None
        admitted.stay.fetching = False
        self._room.end_if_over(admitted.stay)

    def _send_back(self, keys: set[ChunkKey], also: Admitted | None = None) -> None:
        """Returns who waits for chunks that nobody fills any more to the queue; their own fills go on."""
        for entry in list(self._filling):
            if entry in self._filling and not entry.sequence.done and (entry is also or keys & entry.awaited):
                self._leave(entry)
                self._admission.release(entry.sequence)
                self._requeue(entry.sequence)
                self.give_up(entry)


def _look_again() -> None:
    """What is posted to the device thread makes it look at the line; this does nothing else."""
