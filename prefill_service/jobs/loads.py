"""Stored chunks on their way into a pool, read beside the steps of the device: nobody's rows wait for a file.

The reading threads belong to no job. A chunk that is being read is held until that is over, whatever becomes of the job
that asked for it.
"""

from __future__ import annotations

import contextvars
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress

from chunk_store.entry import MissReason
from chunk_store.key import ChunkKey
from chunk_store.landing import Landing
from chunk_store.store import ChunkStore
from engine.kv.host_tier import PoolMemory
from engine.kv.resident import ResidentChunk, ResidentChunks
from engine.reuse import KeyedChunk

READERS = 4

Reading = Future[MissReason | None]


class PoolLoads:
    """Reads entries of ``store`` into ``residents``. ``post`` runs a function in the thread that they belong to.

    ``at_hand`` reads what waits in memory to be stored; False for anything else.
    """

    def __init__(
        self,
        residents: ResidentChunks,
        store: ChunkStore,
        post: Callable[[Callable[[], None]], object],
        at_hand: Callable[[ChunkKey, Landing], bool] = lambda key, landing: False,
    ) -> None:
        self.residents = residents
        self.store = store
        self._memory = PoolMemory(residents.pool)
        self._post = post
        self._at_hand = at_hand
        self._readers = ThreadPoolExecutor(READERS, thread_name_prefix="prefill-load")
        self._begun: dict[ChunkKey, tuple[ResidentChunk, Reading]] = {}

    # -- in the device thread -----------------------------------------------------------------------
    def begin(self, chunks: Sequence[KeyedChunk]) -> list[Reading]:
        """Begins to read chunks that are not resident; what each ends with: None, or why it is of no use.

        Raises ``PoolFull``; what it has begun by then goes on.
        """
        readings = []
        for keyed in chunks:
            if keyed.key in self._begun:
                readings.append(self._begun[keyed.key][1])
            elif self.residents.find(keyed.key) is None:
                readings.append(self._read(keyed, self.residents.reserve(keyed.key, len(keyed.token_ids))))
            else:
                there: Reading = Future()
                there.set_result(None)
                readings.append(there)
        return readings

    def settle(self) -> None:
        """Lets go of what has been read; it is ready, or gone."""
        for key, (chunk, reading) in list(self._begun.items()):
            if reading.done():
                del self._begun[key]
                chunk.ready = not reading.cancelled() and reading.exception() is None and reading.result() is None
                self.residents.release(chunk)

    def _read(self, keyed: KeyedChunk, chunk: ResidentChunk) -> Reading:
        memory = self._memory.of(chunk)

        def land(landing: Landing) -> MissReason | None:
            if self._at_hand(keyed.key, landing):
                return None
            return self.store.land(keyed.key, keyed.token_ids, landing)

        def read() -> MissReason | None:
            return memory.fill(land)[1]

        try:
            reading = self._readers.submit(contextvars.copy_context().run, read)
        except RuntimeError:
            self.residents.release(chunk)
            raise
        self._begun[keyed.key] = chunk, reading
        reading.add_done_callback(self._done)
        return reading

    # -- in any thread ------------------------------------------------------------------------------
    def _done(self, _: Reading) -> None:
        with suppress(RuntimeError):  # the device thread has ended, and nobody asks for pages any more
            self._post(self.settle)

    def stop(self) -> None:
        """Waits for what is being read. Before the device thread ends."""
        self._readers.shutdown(wait=True, cancel_futures=True)
