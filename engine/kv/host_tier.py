"""Host memory between the store and the pool: pinned, bounded, least recently used chunks first to go.

    store --read + verify--> pinned memory --own stream, a copy a plane--> pages of the pool
                             stays here: the next load of the chunk starts from it

Loads of several chunks run in threads of their own: while one chunk is read another is on the bus, and decode steps
on the device's main stream go on. A load returns when its bytes are in the pages. Those pages may have belonged to
somebody whose last step still runs: a copy begins when what was launched before the pages were given out is over. The
tier knows keys and bytes, not what they mean.
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
from engine.device import current
from engine.kv.pool import PagedKVPool
from engine.kv.pool_bytes import as_bytes, copy_planes
from engine.kv.resident import ResidentChunk
from engine.kv.source import KVSource

ALIGN_NBYTES = 4096

FailureT = TypeVar("FailureT")
Read = Callable[[Sequence[memoryview]], "FailureT | None"]  # fills the buffers; None if they are right


@dataclass
class _Entry:
    """A chunk's place in the arena. ``users`` are loads that read or write it now."""

    at: int
    nbytes: int
    users: int = 1
    ready: bool = False


class HostTier:
    """Pinned memory of ``nbytes`` for chunks of one pool's device. Thread-safe.

    With 0 bytes nothing is kept, and every load passes through memory of its own.
    """

    def __init__(self, nbytes: int, device: torch.device | str) -> None:
        self.nbytes = nbytes // ALIGN_NBYTES * ALIGN_NBYTES
        self._device = torch.device(device)
        self._pinned = self._device.type == "cuda"
        with current(self._device):
            self._arena = torch.empty(self.nbytes, dtype=torch.uint8, pin_memory=self._pinned and self.nbytes > 0)
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

        Nothing is copied before ``after``. Returns where the bytes were and, if ``read`` failed, how; then the planes
        are as they were.
        """
        nbytes = sum(plane.nbytes for plane in planes)
        entry, found = self._enter(key, nbytes)
        try:
            with current(self._device):
                memory = self._memory(entry, nbytes)
            staged = _split(memory, planes)
            if not found:
                failure = read(as_bytes(staged))
                if failure is not None:
                    return KVSource.STORE, failure
                if entry is not None:
                    with self._lock:
                        entry.ready = True
            with current(self._device):
                self._copy(planes, staged, after)
            return (KVSource.HOST if found else KVSource.STORE), None
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

    def _memory(self, entry: _Entry | None, nbytes: int) -> Tensor:
        if entry is not None:
            return self._arena[entry.at : entry.at + nbytes]
        return torch.empty(nbytes, dtype=torch.uint8, pin_memory=self._pinned)

    def _copy(self, planes: Sequence[Tensor], staged: Sequence[Tensor], after: torch.cuda.Event | None) -> None:
        """Copies on this thread's own stream and waits for it; the main stream goes on meanwhile."""
        if not self._pinned:
            copy_planes(planes, staged)
            return
        stream = getattr(self._streams, "stream", None)
        if stream is None:
            stream = self._streams.stream = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]
        with torch.cuda.stream(stream):
            if after is not None:
                stream.wait_event(after)
            copy_planes(planes, staged)
        stream.synchronize()


def _split(memory: Tensor, planes: Sequence[Tensor]) -> list[Tensor]:
    """Consecutive views of ``memory`` (bytes) with the planes' shapes and dtypes."""
    views, at = [], 0
    for plane in planes:
        views.append(memory[at : at + plane.nbytes].view(plane.dtype).view(plane.shape))
        at += plane.nbytes
    return views


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
        """Brings the KV into the pages, by ``read`` into buffers of layout order if it must.

        Returns where it was, and why it could not be read; the content of the pages is then undefined.
        """
        if self.tier is None:
            return KVSource.STORE, read(as_bytes(self.planes))
        return self.tier.load(self.key, self.planes, read, after=self.launched)
