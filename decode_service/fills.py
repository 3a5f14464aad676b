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

from chunk_store.tenant import tenant_of
from decode_service.admission import Admission, Admitted
from decode_service.sequence import Failed, Sequence
from decode_service.source import Fetched, FetchFailed, StoreSource
from serving.logs import bearing

log = logging.getLogger(__name__)

# A fill that failed for one of these would fail for everyone; for any other, the others try for themselves.
OUTAGES = ("UNAVAILABLE", "DEADLINE_EXCEEDED")

Post = Callable[[Callable[[], None]], None]


class Fills:
    """``begin`` takes an admitted request in, ``take_ready`` gives those out whose chunks are all there.

    ``post`` runs a function in the device thread; ``end`` ends a request that cannot be filled, ``requeue`` takes
    one back that has to be admitted again. One of ``threads`` loaders for each request that can be filling.
    """

    def __init__(
        self,
        source: StoreSource,
        admission: Admission,
        post: Post,
        *,
        end: Callable[[Sequence, Failed], None],
        requeue: Callable[[Sequence], None],
        threads: int,
    ) -> None:
        self._source = source
        self._admission = admission
        self._post = post
        self._end = end
        self._requeue = requeue
        self._filling: list[Admitted] = []
        self._loaders = ThreadPoolExecutor(threads, thread_name_prefix="cairn-load")

    def __len__(self) -> int:
        return len(self._filling)

    @property
    def sequences(self) -> list[Sequence]:
        return [entry.sequence for entry in self._filling]

    def begin(self, admitted: Admitted) -> None:
        """Takes a request in and starts fetching what it wants."""
        self._filling.append(admitted)
        if admitted.wanted and not admitted.sequence.bypass:
            self._loaders.submit(self._fetch_bearing_id, admitted)

    def take_ready(self) -> list[Admitted]:
        """The requests whose chunks are all there, or are computed here; those that have ended are dropped."""
        ready: list[Admitted] = []
        for entry in list(self._filling):
            if entry.sequence.done:
                self._filling.remove(entry)
            elif entry.sequence.bypass or self._admission.all_ready(entry):
                self._filling.remove(entry)
                entry.sequence.clock.filled = time.monotonic_ns()
                ready.append(entry)
        return ready

    def stop(self) -> None:
        """Starts nothing more; fetches that run end by themselves."""
        self._loaders.shutdown(wait=False, cancel_futures=True)

    def _fetch_bearing_id(self, admitted: Admitted) -> None:
        with bearing(admitted.sequence.request_id):
            self._fetch(admitted)

    def _fetch(self, admitted: Admitted) -> None:
        """In a loader thread: fills an admitted request's chunks and tells the device thread."""
        sequence = admitted.sequence

        def abandoned() -> bool:
            # Read from another thread: should somebody join meanwhile, it is returned to the queue.
            return sequence.done and all(chunk.holders <= 1 for chunk in admitted.fills)

        try:
            fetched = self._source.fetch(
                sequence.composition, admitted.wanted, sequence.salt, tenant_of(sequence.salt), abandoned
            )
        except FetchFailed as error:
            self._post(partial(self._failed, admitted, Failed(error.code, str(error))))
        except Exception as error:
            log.exception("loading KV failed")
            unexpected = Failed("INTERNAL", f"loading KV failed ({type(error).__name__}); see the log")
            self._post(partial(self._failed, admitted, unexpected))
        else:
            self._post(partial(self._fetched, admitted, fetched))

    def _fetched(self, admitted: Admitted, fetched: Fetched) -> None:
        self._admission.filled(admitted)
        if admitted in self._filling:  # else it has ended, or was returned to the queue
            clock = admitted.sequence.clock
            clock.lookup_ns, clock.prefill_ns, clock.load_ns = fetched.lookup_ns, fetched.prefill_ns, fetched.load_ns
            for index, outcome in fetched.outcomes.items():
                admitted.sequence.outcomes[index] = outcome

    def _failed(self, admitted: Admitted, failure: Failed) -> None:
        """Ends the request. Those that wait for its chunks end with it or try for themselves."""
        keys = self._admission.fill_failed(admitted)
        if admitted in self._filling:
            self._end(admitted.sequence, failure)
        waiters = [e for e in self._filling if e is not admitted and not e.sequence.done and keys & e.awaited]
        for entry in reversed(waiters):
            if failure.code in OUTAGES:
                self._end(entry.sequence, failure)
            else:
                self._filling.remove(entry)
                self._admission.release(entry.sequence)  # its own fills go on
                entry.sequence.outcomes.clear()
                self._requeue(entry.sequence)
