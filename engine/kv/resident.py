"""Resident chunks: which KV is in the pool now, who uses it, and what goes first when room is needed.

A chunk stays while anyone holds it; an unheld one stays until its pages are wanted, the least recently used
first. Who reads its pages beside the steps (a publication, another process) holds it *still*: then it is not moved
either. The table does not know where KV comes from.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from chunk_store.key import ChunkKey

if TYPE_CHECKING:  # the bookkeeping needs no tensors: a page table without memory will do
    from engine.kv.pages import PageRun
    from engine.kv.pool import PagedKVPool


class PoolFull(RuntimeError):
    """No run of pages is free and nothing more can be evicted now: chunks in use fill the chunk region."""


@dataclass
class ResidentChunk:
    """A chunk in the pool. ``first_slot`` may change between steps (compaction), never during one."""

    key: ChunkKey
    tokens: int
    run: PageRun
    holders: int = 0
    still: int = 0  # holders that need it to stay where it is
    ready: bool = field(default=False)  # its bytes are all there

    def first_slot(self, page_size: int) -> int:
        return self.run.first * page_size


class ResidentChunks:
    """The chunks of one pool, by key. Not thread-safe: it belongs to the thread that launches device work."""

    def __init__(self, pool: PagedKVPool) -> None:
        self.pool = pool
        self._chunks: OrderedDict[ChunkKey, ResidentChunk] = OrderedDict()  # least recently used first
        self.evictions = 0
        self.on_evict: list[Callable[[ChunkKey], None]] = []  # who is told of each chunk that has left
        # Asked when there is no room: whether who holds chunks for others' sake has let go of some.
        self.call_back: Callable[[], bool] = lambda: False
        self.moves = 0  # how often runs have been moved: places read before are stale when it changes

    def __len__(self) -> int:
        return len(self._chunks)

    def find(self, key: ChunkKey) -> ResidentChunk | None:
        """The chunk if it is here, ready or still being filled. Does not change the order of eviction."""
        return self._chunks.get(key)

    def acquire(self, key: ChunkKey) -> ResidentChunk | None:
        """Holds a chunk that is here; each ``acquire`` and ``reserve`` needs one ``release``."""
        chunk = self._chunks.get(key)
        if chunk is not None:
            chunk.holders += 1
            self._chunks.move_to_end(key)
        return chunk

    def reserve(self, key: ChunkKey, tokens: int) -> ResidentChunk:
        """Makes room for a chunk and holds it; the caller fills its pages and sets ``ready``.

        Evicts unheld chunks, then moves runs together, and does so again with what was called back. Raises
        ``PoolFull`` if that is not enough, and ``ValueError`` if the chunk is here already.
        """
        if key in self._chunks:
            raise ValueError(f"reserve: {key} is resident")
        run = self._make_room(tokens)
        if run is None and self.call_back():
            run = self._make_room(tokens)
        if run is None:
            raise PoolFull(
                f"chunk of {tokens} tokens needs {self.pool.pages_for(tokens)} neighbouring pages; chunks in use "
                f"fill the chunk region of {self.pool.chunk_pages} pages"
            )
        chunk = ResidentChunk(key, tokens, run, holders=1)
        self._chunks[key] = chunk
        return chunk

    def _make_room(self, tokens: int) -> PageRun | None:
        run = self.pool.allocate_run(tokens)
        while run is None and self._evict_one():
            run = self.pool.allocate_run(tokens)
        if run is None and self._compact():
            run = self.pool.allocate_run(tokens)
        return run

    def release(self, chunk: ResidentChunk) -> None:
        """Gives one hold back. A chunk that was never filled leaves with its last holder."""
        if chunk.holders < 1:
            raise ValueError(f"release: {chunk.key} is not held")
        chunk.holders -= 1
        if chunk.holders == 0 and not chunk.ready:
            self._drop(chunk)

    def hold_still(self, chunk: ResidentChunk) -> None:
        """Holds a chunk as ``acquire`` does, and keeps it where it is; each needs one ``let_move``.

        For who reads its pages from another thread, stream or process. Raises ``ValueError`` for a chunk that has gone.
        """
        if self._chunks.get(chunk.key) is not chunk:
            raise ValueError(f"hold_still: {chunk.key} is not resident")
        self.acquire(chunk.key)
        chunk.still += 1

    def let_move(self, chunk: ResidentChunk) -> None:
        """Gives back one ``hold_still``."""
        if chunk.still < 1:
            raise ValueError(f"let_move: {chunk.key} is not held still")
        chunk.still -= 1
        self.release(chunk)

    def rename(self, chunk: ResidentChunk, key: ChunkKey, tokens: int) -> None:
        """Gives a chunk that only its holder knows the name it goes by, and the number of its tokens that count.

        Raises ``ValueError`` if another chunk has that name, or more tokens are to count than there are.
        """
        if key in self._chunks or not 1 <= tokens <= chunk.tokens:
            raise ValueError(f"rename: {key} is resident, or {tokens} are not 1..{chunk.tokens} tokens")
        del self._chunks[chunk.key]
        chunk.key, chunk.tokens = key, tokens
        self._chunks[key] = chunk

    def evict(self, key: ChunkKey) -> bool:
        """Drops an unheld chunk now; False if it is held or not here."""
        chunk = self._chunks.get(key)
        if chunk is None or chunk.holders:
            return False
        self._drop(chunk)
        self.evictions += 1
        for told in self.on_evict:
            told(key)
        return True

    def _evict_one(self) -> bool:
        oldest = next((c for c in self._chunks.values() if c.holders == 0), None)
        return oldest is not None and self.evict(oldest.key)

    def _drop(self, chunk: ResidentChunk) -> None:
        del self._chunks[chunk.key]
        self.pool.release_run(chunk.run)

    def _compact(self) -> bool:
        """Slides runs down over the gaps; chunks still being filled, or held still, stay where they are."""
        moved, floor = False, 0
        for chunk in sorted(self._chunks.values(), key=lambda c: c.run.first):
            if chunk.ready and not chunk.still and floor < chunk.run.first:
                chunk.run = self.pool.move_run(chunk.run, floor)
                moved = True
                self.moves += 1
            floor = chunk.run.first + chunk.run.pages
        return moved

    def check_integrity(self) -> None:
        """Raises ``PoolError`` or ``ValueError`` unless runs and chunks correspond one to one."""
        self.pool.check_integrity()
        if [c.run for c in sorted(self._chunks.values(), key=lambda c: c.run.first)] != self.pool.runs:
            raise ValueError("the runs of resident chunks differ from the pool's runs")
        if wrong := [c.key for c in self._chunks.values() if not 0 <= c.still <= c.holders]:
            raise ValueError(f"chunks that more hold still than hold them: {wrong}")

    @property
    def pages_held(self) -> int:
        """Pages of chunks with at least one holder: what no eviction can free."""
        return sum(chunk.run.pages for chunk in self._chunks.values() if chunk.holders)

    @property
    def held(self) -> int:
        """Chunks with at least one holder."""
        return sum(1 for chunk in self._chunks.values() if chunk.holders)
