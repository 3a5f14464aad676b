"""Admission: all the pages a request needs, or none, and who fills which chunk.

A chunk that several requests want is filled once: the first to be admitted reserves and fetches it, the
others hold it and wait. The fill itself holds the chunk too, so pages are never given away while a load
still writes to them, whatever happens to the request that asked.
"""

from __future__ import annotations

import uuid
from collections import deque
from collections.abc import Collection
from dataclasses import dataclass, field

from chunk_store.key import ChunkKey
from decode_service.kv_source.pool_memory import PoolMemory
from decode_service.kv_source.store_source import Wanted
from decode_service.line import FillRoom, Misfit, Stay
from decode_service.sequence import ChunkOutcome, Sequence
from engine.kv.resident import PoolFull, ResidentChunk, ResidentChunks
from engine.kv.source import KVSource
from serving.errors import Unsupported


@dataclass
class Admitted:
    """A request with its pages. ``wanted`` are the chunks it must fetch, ``awaited`` those others fetch.

    ``filling`` are the chunks whose fetch holds them, by index; ``to_compute`` the indices of those that are computed
    here, of the first of which ``computed`` tokens are done.
    """

    sequence: Sequence
    wanted: list[Wanted]
    awaited: set[ChunkKey]
    filling: dict[int, ResidentChunk] = field(default_factory=dict)
    to_compute: deque[int] = field(default_factory=deque)
    computed: int = 0
    stay: Stay | None = None

    @property
    def takes(self) -> Misfit | None:
        """Which room to wait for KV in it takes."""
        return None if self.stay is None else _room_of(self.stay)


def _room_of(stay: Stay) -> Misfit:
    return Misfit.ASK if stay.long else Misfit.LOAD


class Admission:
    """Acquires and releases what sequences hold. Belongs to the device thread."""

    def __init__(self, residents: ResidentChunks, room: FillRoom, *, host_nbytes: int = 0) -> None:
        self.residents = residents
        self.room = room
        self.pool = residents.pool
        self._memory = PoolMemory(residents.pool, host_nbytes=host_nbytes)

    def check_size(self, sequence: Sequence) -> None:
        """Raises ``Unsupported`` if the sequence could never be admitted."""
        # A chunk that stands in several places has one copy, except where nothing is shared.
        chunks = enumerate(sequence.composition.chunks)
        lengths = {index if sequence.bypass else c.key: len(c.token_ids) for index, c in chunks}
        chunk_pages = sum(self.pool.pages_for(tokens) for tokens in lengths.values())
        if chunk_pages > self.pool.chunk_pages:
            raise Unsupported(
                f"segments: their chunks need {chunk_pages} pages of the KV pool; at most {self.pool.chunk_pages} hold "
                "chunks (raise kv-pages or chunk-page-ratio)"
            )
        tail_pages, most = self.pool.pages_for(sequence.tail_tokens_max), self.pool.pages - self.pool.chunk_pages
        if tail_pages > most:
            raise Unsupported(
                f"sampling.max_tokens: query and answer need {tail_pages} pages of the KV pool; at most {most} hold "
                "tails (lower max_tokens, raise kv-pages or lower chunk-page-ratio)"
            )

    def admit(self, sequence: Sequence, kept: Collection[Misfit] = ()) -> Admitted | Misfit:
        """Holds every chunk and tail page of a sequence, and its part of the room to fill in; or nothing at all.

        ``kept``: rooms that it must not enter.
        """
        stay = self._stay_of(sequence)
        if stay is not None and (_room_of(stay) in kept or not self.room.enter(stay)):
            return _room_of(stay)
        admitted = self._hold(sequence)
        if admitted is None:
            if stay is not None:
                stay.waiting = False
                self.room.end_if_over(stay)
            return Misfit.PAGES
        admitted.stay = stay
        return admitted

    def _stay_of(self, sequence: Sequence) -> Stay | None:
        """What the sequence would take of the room to fill in; None if its KV is here, or is computed with it."""
        if sequence.bypass:
            return None
        found = {c.key: (self.residents.find(c.key), len(c.token_ids)) for c in sequence.composition.chunks}
        absent = [tokens for chunk, tokens in found.values() if chunk is None]
        joins = any(chunk is not None and not chunk.ready for chunk, _ in found.values())
        if not absent and not joins:
            return None
        chunk_pages = sum(self.pool.pages_for(tokens) for tokens in absent)
        tail_pages = self.pool.pages_for(sequence.tail_tokens_max)
        return Stay(chunk_pages, tail_pages, long=joins or sequence.cold)

    def _hold(self, sequence: Sequence) -> Admitted | None:
        pages = self.pool.allocate_pages(self.pool.pages_for(sequence.tail_tokens_max))
        if pages is None:
            return None
        moves = self.residents.moves
        admitted = self._hold_chunks(sequence)
        if admitted is None and self.residents.moves != moves:
            # What was reserved before runs were moved together had to stay where it was: now it may fit.
            admitted = self._hold_chunks(sequence)
        if admitted is None:
            self.pool.release_pages(pages)
            return None
        sequence.tail_pages = tuple(pages)
        return admitted

    def _hold_chunks(self, sequence: Sequence) -> Admitted | None:
        """Holds the chunks that are here before it makes room for the others, lest one makes room for another."""
        keys = [
            ChunkKey(f"bypass:{uuid.uuid4()}") if sequence.bypass else keyed.key
            for keyed in sequence.composition.chunks
        ]
        held = [self.residents.acquire(key) for key in keys]
        admitted = Admitted(sequence, [], {c.key for c in held if c is not None and not c.ready})
        try:
            self._check_room(sequence, {key: i for i, key in enumerate(keys) if held[i] is None})
            for index, key in enumerate(keys):
                if held[index] is None:
                    held[index] = self._hold_absent(admitted, index, key)
        except PoolFull:
            for chunk in held:
                if chunk is not None:
                    self.residents.release(chunk)
            return None
        sequence.chunks = [chunk for chunk in held if chunk is not None]
        sequence.outcomes = [ChunkOutcome(KVSource.COMPUTED if sequence.bypass else KVSource.DEVICE) for _ in held]
        for chunk in admitted.filling.values():
            self.residents.acquire(chunk.key)
        return admitted

    def _check_room(self, sequence: Sequence, absent: dict[ChunkKey, int]) -> None:
        """Raises ``PoolFull`` if evicting all that nobody holds were not enough; then nothing is evicted."""
        chunks = sequence.composition.chunks
        need = sum(self.pool.pages_for(len(chunks[index].token_ids)) for index in absent.values())
        if need > self.pool.chunk_pages - self.residents.pages_held:
            raise PoolFull(f"{need} pages are needed; chunks in use fill the chunk region")

    def _hold_absent(self, admitted: Admitted, index: int, key: ChunkKey) -> ResidentChunk:
        repeated = self.residents.acquire(key)  # it stands here a second time
        if repeated is not None:
            return repeated
        chunk = self.residents.reserve(key, len(admitted.sequence.composition.chunks[index].token_ids))
        if admitted.sequence.bypass:
            admitted.to_compute.append(index)
        else:
            admitted.filling[index] = chunk
            admitted.wanted.append(Wanted(index, self._memory.of(chunk)))
        return chunk

    def filled(self, admitted: Admitted, index: int) -> None:
        """A chunk's KV is all there: it can be read, by this request and by those that waited."""
        chunk = admitted.filling.pop(index)
        chunk.ready = True
        self.residents.release(chunk)

    def fill_failed(self, admitted: Admitted) -> set[ChunkKey]:
        """What is not filled yet never will be: its chunks leave the pool with their holders. Returns their keys."""
        failed = list(admitted.filling.values())
        admitted.filling.clear()
        for chunk in failed:
            self.residents.release(chunk)
        return {chunk.key for chunk in failed}

    def all_ready(self, admitted: Admitted) -> bool:
        """Whether all KV is there but what is computed here."""
        chunks = enumerate(admitted.sequence.chunks)
        return all(chunk.ready or index in admitted.to_compute for index, chunk in chunks)

    def release(self, sequence: Sequence) -> None:
        """Gives back the pages and holds of a sequence; what bypassed the caches leaves the pool at once."""
        self.pool.release_pages(sequence.tail_pages)
        sequence.tail_pages = ()
        for chunk in sequence.chunks:
            self.residents.release(chunk)
            if sequence.bypass:
                self.residents.evict(chunk.key)
        sequence.chunks = []
