"""Admission: all the pages a request needs, or none, and who fills which chunk.

A chunk that several requests want is filled once: the first to be admitted reserves and fetches it, the
others hold it and wait. The fill itself holds the chunk too, so pages are never given away while a load
still writes to them, whatever happens to the request that asked.
"""

from __future__ import annotations

import uuid
from collections.abc import Collection
from dataclasses import dataclass, field

from chunk_store.key import ChunkKey
from decode_service.kv_source.store_source import Wanted
from decode_service.line import FillRoom, Misfit, Stay
from decode_service.prompt.request_chunk import ChunkOutcome, RequestChunk
from decode_service.sequence import Sequence
from engine.kv.host_tier import PoolMemory
from engine.kv.resident import PoolFull, ResidentChunk, ResidentChunks
from engine.kv.source import KVSource
from serving.errors import Unsupported


@dataclass
class Admitted:
    """A request with its pages. ``wanted`` are the chunks it must fetch, ``awaited`` those others fetch.

    ``filling`` are the chunks whose fetch holds their pages.
    """

    sequence: Sequence
    wanted: list[Wanted]
    awaited: set[ChunkKey]
    filling: dict[RequestChunk, ResidentChunk] = field(default_factory=dict)
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
        chunks = sequence.composition.chunks
        lengths = {chunk.index if sequence.bypass else chunk.key: len(chunk.token_ids) for chunk in chunks}
        chunk_pages = sum(self.pool.pages_for(tokens) for tokens in lengths.values())
        if chunk_pages > self.pool.chunk_pages:
            raise Unsupported(
                f"their chunks need {chunk_pages} pages of the KV pool; at most {self.pool.chunk_pages} hold chunks "
                "(raise kv-pages or chunk-page-ratio)",
                field="segments",
            )
        tail_pages, most = self.pool.pages_for(sequence.tail_tokens_max), self.pool.pages - self.pool.chunk_pages
        if tail_pages > most:
            raise Unsupported(
                f"query and answer need {tail_pages} pages of the KV pool; at most {most} hold tails (lower "
                "max_tokens, raise kv-pages or lower chunk-page-ratio)",
                field="sampling.max_tokens",
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
        chunks = sequence.composition.chunks
        for chunk in chunks:
            chunk.computed = None
            chunk.outcome = ChunkOutcome(KVSource.COMPUTED if sequence.bypass else KVSource.DEVICE)
            chunk.resident = None if sequence.bypass else self.residents.acquire(chunk.key)
        here = [chunk.resident for chunk in chunks if chunk.resident is not None]
        admitted = Admitted(sequence, [], {resident.key for resident in here if not resident.ready})
        try:
            self._check_room([chunk for chunk in chunks if chunk.resident is None], bypass=sequence.bypass)
            for chunk in chunks:
                if chunk.resident is None:
                    chunk.resident = self._hold_absent(admitted, chunk)
        except PoolFull:
            self._let_go(sequence)
            return None
        for resident in admitted.filling.values():
            self.residents.acquire(resident.key)
        return admitted

    def _check_room(self, absent: list[RequestChunk], *, bypass: bool) -> None:
        """Raises ``PoolFull`` if evicting all that nobody holds were not enough; then nothing is evicted."""
        lengths = {chunk.index if bypass else chunk.key: len(chunk.token_ids) for chunk in absent}
        need = sum(self.pool.pages_for(tokens) for tokens in lengths.values())
        if need > self.pool.chunk_pages - self.residents.pages_held:
            raise PoolFull(f"{need} pages are needed; chunks in use fill the chunk region")

    def _hold_absent(self, admitted: Admitted, chunk: RequestChunk) -> ResidentChunk:
        if admitted.sequence.bypass:
            chunk.computed = 0
            return self.residents.reserve(ChunkKey(f"bypass:{uuid.uuid4()}"), len(chunk.token_ids))
        repeated = self.residents.acquire(chunk.key)  # it stands here a second time
        if repeated is not None:
            return repeated
        resident = self.residents.reserve(chunk.key, len(chunk.token_ids))
        admitted.filling[chunk] = resident
        admitted.wanted.append(Wanted(chunk, self._memory.of(resident)))
        return resident

    def filled(self, admitted: Admitted, chunk: RequestChunk) -> None:
        """A chunk's KV is all there: it can be read, by this request and by those that waited."""
        resident = admitted.filling.pop(chunk)
        resident.ready = True
        self.residents.release(resident)

    def fill_failed(self, admitted: Admitted) -> set[ChunkKey]:
        """What is not filled yet never will be: its chunks leave the pool with their holders. Returns their keys."""
        failed = list(admitted.filling.values())
        admitted.filling.clear()
        for resident in failed:
            self.residents.release(resident)
        return {resident.key for resident in failed}

    def all_ready(self, admitted: Admitted) -> bool:
        """Whether all KV is there but what is computed here."""
        return all(chunk.held.ready or chunk.computed is not None for chunk in admitted.sequence.composition.chunks)

    def release(self, sequence: Sequence) -> None:
        """Gives back the pages and holds of a sequence; what bypassed the caches leaves the pool at once."""
        self.pool.release_pages(sequence.tail_pages)
        sequence.tail_pages = ()
        self._let_go(sequence)

    def _let_go(self, sequence: Sequence) -> None:
        for chunk in sequence.composition.chunks:
            resident, chunk.resident = chunk.resident, None
            if resident is not None:
                self.residents.release(resident)
                if sequence.bypass:
                    self.residents.evict(resident.key)
