"""Host memory between the store and the pool: pinned, bounded, least recently used chunks first to go.

    store --read + verify--> pinned memory --a stream for each load, piece by piece--> pages of the pool
                             stays here: the next load of the chunk starts from it

Loads of several chunks run in threads of their own, and each is read by several: while one piece is read another is on
the bus, and decode steps on the device's main stream go on. A load returns when its bytes are in the pages. Those pages
may have belonged to somebody whose last step still runs: a copy begins when what was launched before the pages were
given out is over. The tier knows keys and bytes, not what they mean.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from chunk_store.key import ChunkKey
from chunk_store.landing import Buffers, Landing
from engine.device import current
from engine.kv.bounce import Bounce
from engine.kv.copier import Copier
from engine.kv.device_landing import DeviceLanding
from engine.kv.pool import PagedKVPool
from engine.kv.pool_bytes import as_bytes
from engine.kv.resident import ResidentChunk
from engine.kv.source import KVSource

ALIGN_NBYTES = 4096
PIECES, PIECE_NBYTES = 24, 8 * 2**20  # what loads pass through that are not kept here

FailureT = TypeVar("FailureT")
Read = Callable[[Landing], "FailureT | None"]  # reads into it; None if what it read is right


@dataclass
class _Entry:
    """A chunk's place in the arena. ``users`` are loads that read or write it now."""

    at: int
    nbytes: int
    users: int = 1
    ready: bool = False


class HostTier:
    """Pinned memory of ``nbytes`` for chunks of one pool's device. Thread-safe.

    What finds no room, with 0 bytes everything, passes through ``pieces`` pieces of ``piece_nbytes`` bytes that all
    loads share.
    """

    def __init__(
        self, nbytes: int, device: torch.device | str, *, pieces: int = PIECES, piece_nbytes: int = PIECE_NBYTES
    ) -> None:
        self.nbytes = nbytes // ALIGN_NBYTES * ALIGN_NBYTES
        self._device = torch.device(device)
        self._pinned = self._device.type == "cuda"
        with current(self._device):
            self._arena = torch.empty(self.nbytes, dtype=torch.uint8, pin_memory=self._pinned and self.nbytes > 0)
        self._bounce = Bounce(self._device, pieces=pieces, piece_nbytes=piece_nbytes)
        self._copier = Copier(self._device)
        self._entries: OrderedDict[ChunkKey, _Entry] = OrderedDict()  # least recently used first
        self._lock = threading.Lock()
        self._streams = threading.local()
        self.evictions = 0

    def __contains__(self, key: ChunkKey) -> bool:
        with self._lock:
            entry = self._entries.get(key)
            return entry is not None and entry.ready

    def load(
        self, key: ChunkKey, planes: Sequence[Tensor], read: Read[FailureT], *, after: torch.cuda.Event | None = None
    ) -> tuple[KVSource, FailureT | None]:
        """Brings a chunk's bytes into ``planes`` (contiguous views of the pool), through ``read`` if they are not here.

        Nothing is copied before ``after``. Returns where the bytes were and, if ``read`` failed, how; the content of
        the planes is then undefined. Nothing is on its way to them any more when it returns or raises.
        """
        nbytes = sum(plane.nbytes for plane in planes)
        entry, found = self._enter(key, nbytes)
        try:
            kept = None if entry is None else self._arena[entry.at : entry.at + nbytes]
            landing = DeviceLanding(planes, self._bounce, self._copier, stream=self._stream(after), kept=kept)
            try:
                if found and kept is not None:
                    landing.send(kept, 0, 0, nbytes)
                    return KVSource.HOST, None
                failure = read(landing)
            finally:
                landing.wait()
            if failure is None and entry is not None:
                with self._lock:
                    entry.ready = True
            return KVSource.STORE, failure
        finally:
            self._leave(key, entry)

    # -- inside -------------------------------------------------------------------------------------
    def _enter(self, key: ChunkKey, nbytes: int) -> tuple[_Entry | None, bool]:
        """A chunk's entry, in use now, and whether its bytes are there; None if there is no room for it."""
        with self._lock:
            entry = self._entries.get(key)
            if entry is not None:
                if not entry.ready or entry.nbytes != nbytes:
                    return None, False  # another load is filling it; this one goes past
                entry.users += 1
                self._entries.move_to_end(key)
                return entry, True
            at = self._make_room(nbytes)
            if at is None:
                return None, False
            entry = self._entries[key] = _Entry(at, nbytes)
            return entry, False

    def _leave(self, key: ChunkKey, entry: _Entry | None) -> None:
        if entry is None:
            return
        with self._lock:
            entry.users -= 1
            if entry.users == 0 and not entry.ready:
                del self._entries[key]

    def _make_room(self, nbytes: int) -> int | None:
        """The first gap of ``nbytes``, after evicting as many unused entries as it takes; None if that fails."""
        if nbytes > self.nbytes:
            return None
        while (at := self._gap(nbytes)) is None:
            oldest = next((key for key, entry in self._entries.items() if entry.users == 0), None)
            if oldest is None:
                return None
            del self._entries[oldest]
            self.evictions += 1
        return at

    def _gap(self, nbytes: int) -> int | None:
        start = 0
        for entry in sorted(self._entries.values(), key=lambda e: e.at):
            if entry.at - start >= nbytes:
                return start
            start = entry.at + -(-entry.nbytes // ALIGN_NBYTES) * ALIGN_NBYTES
        return start if self.nbytes - start >= nbytes else None

    def _stream(self, after: torch.cuda.Event | None) -> torch.cuda.Stream | None:
        """This thread's own stream, begun behind ``after``; the main stream goes on meanwhile."""
        if not self._pinned:
            return None
        with current(self._device):
            stream: torch.cuda.Stream | None = getattr(self._streams, "stream", None)
            if stream is None:
                stream = self._streams.stream = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]
            if after is not None:
                stream.wait_event(after)
        return stream


class PoolMemory:
    """Makes the memory of chunks of one pool. ``host_nbytes`` of pinned memory keep what was loaded to a device."""

    def __init__(self, pool: PagedKVPool, *, host_nbytes: int = 0) -> None:
        self._pool = pool
        self._tier = None if pool.device.type == "cpu" else HostTier(host_nbytes, pool.device)

    def of(self, chunk: ResidentChunk) -> ChunkMemory:
        """The memory of a reserved chunk, which nobody moves while it is being filled.

        To be called in the thread that launches: what it has launched may still read and write there.
        """
        launched = None
        if self._tier is not None:
            with current(self._pool.device):
                launched = torch.cuda.current_stream().record_event()
        return ChunkMemory(chunk.key, self._pool.run_planes(chunk.run, chunk.tokens), self._tier, launched)


@dataclass(frozen=True)
class ChunkMemory:
    """Where a chunk's KV goes: planes of the pool, straight (without a tier, on the CPU) or through host memory.

    ``launched``: what ran on the device when the planes were given out.
    """

    key: ChunkKey
    planes: Sequence[Tensor]
    tier: HostTier | None = None
    launched: torch.cuda.Event | None = None

    @property
    def held(self) -> bool:
        """Whether ``fill`` would need no reading now."""
        return self.tier is not None and self.key in self.tier

    def fill(self, read: Read[FailureT]) -> tuple[KVSource, FailureT | None]:
        """Brings the KV into the pages, by ``read`` if it must.

        Returns where it was, and why it could not be read; the content of the pages is then undefined.
        """
        if self.tier is None:
            return KVSource.STORE, read(Buffers(as_bytes(self.planes)))
        return self.tier.load(self.key, self.planes, read, after=self.launched)
