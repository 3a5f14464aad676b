"""The threads that bring KV into the pool: each takes a fill, and the scheduler is told how it went."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial

from decode_service.kv_source.asking import FetchTerms, NoRoomToAsk, Wanted
from decode_service.kv_source.fetcher import KVFetcher
from decode_service.scheduling.admission import Fill
from decode_service.scheduling.scheduler import Scheduler
from engine.kv.host_tier import PoolMemory
from serving.errors import Cancelled, InternalFault, RequestError
from serving.trace.request_id import bearing

log = logging.getLogger(__name__)

ANSWER_POLL_S = 0.25  # how often who waits for the scheduler looks whether anybody still waits for him


class Loader:
    """``threads`` loads at once. ``post`` runs a function in the device thread."""

    def __init__(
        self,
        source: KVFetcher,
        memory: PoolMemory,
        scheduler: Scheduler,
        post: Callable[[Callable[[], None]], None],
        *,
        threads: int,
    ) -> None:
        self.source = source
        self._memory = memory
        self._scheduler = scheduler
        self._post = post
        self._threads = ThreadPoolExecutor(threads, thread_name_prefix="cairn-load")

    def start(self, fill: Fill) -> None:
        """Begins a load, in the device thread: its pages were reserved just now."""
        wanted = [Wanted(chunk, self._memory.of(resident)) for chunk, resident in fill.chunks.items()]
        self._threads.submit(self._load, fill, wanted)

    def stop(self) -> None:
        """Starts nothing more; loads that run end by themselves."""
        self._threads.shutdown(wait=False, cancel_futures=True)

    def _load(self, fill: Fill, wanted: list[Wanted]) -> None:
        sequence, scheduler = fill.sequence, self._scheduler
        told: set[Wanted] = set()

        def came(want: Wanted) -> None:
            assert want.outcome is not None
            told.add(want)
            self._post(partial(scheduler.came, fill, want.chunk, want.outcome))

        may_ask = partial(self._may_ask, fill)
        terms = FetchTerms(sequence.salt, sequence.deadline, lambda: fill.abandoned, may_ask, came, sequence.for_chunks)
        with bearing(sequence.request_id):
            try:
                spent_ns = self.source.fetch(sequence.composition, wanted, terms)
            except NoRoomToAsk:
                self._post(partial(scheduler.put_off, fill))
            except RequestError as error:
                self._post(partial(scheduler.load_failed, fill, error, time.monotonic_ns()))
            except Exception as error:
                log.exception("loading KV failed")
                fault = InternalFault(f"loading KV failed ({type(error).__name__})", remedy="see the log")
                self._post(partial(scheduler.load_failed, fill, fault, time.monotonic_ns()))
            else:
                left = (want for want in wanted if want not in told)
                outcomes = {want.chunk: want.outcome for want in left if want.outcome is not None}
                self._post(partial(scheduler.loaded, fill, outcomes, spent_ns))

    def _may_ask(self, fill: Fill) -> bool:
        """The scheduler's answer, soon: between two launches of the device."""
        if fill.stay is not None and fill.stay.long:
            return True
        answer: Future[bool] = Future()
        self._post(lambda: answer.set_result(self._scheduler.may_ask(fill)))
        while not fill.abandoned and time.monotonic() < fill.sequence.deadline:
            try:
                return answer.result(ANSWER_POLL_S)
            except TimeoutError:
                continue
        raise Cancelled("nobody waits for this KV any more")
