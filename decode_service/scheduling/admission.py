"""Admission: pages of all of a request's chunks, or none, and who fills which chunk.

A chunk that several requests want is filled once: the first to be admitted reserves and fills it, the
others hold it and wait. The fill itself holds the chunk too, so pages are never given away while a load
still writes to them, whatever happens to the request that asked.
"""

from __future__ import annotations

import uuid
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field

from chunk_store.key import ChunkKey
from decode_service.prompt.request_chunk import ChunkOutcome, Claim, RequestChunk
from decode_service.scheduling.line import FillRoom, Misfit, Stay
from decode_service.scheduling.sequence import Sequence
from decode_service.scheduling.tails import Tails
from engine.kv.resident import PoolFull, ResidentChunk, ResidentChunks
from engine.kv.source import KVSource
from engine.sight import EVERYTHING, Sight
from serving.errors import Unsupported


@dataclass(eq=False)
class Fill:
    """What one admission of a request brings into the pool.

    ``chunks`` are those that it fills, with pages that it holds itself; ``awaited`` those that others fill. ``stay`` is
    None where nothing is waited for. ``loading``: a load works on it; it is ``abandoned`` once nobody wants its chunks.
    ``claims`` are of chunks that are computed here, until they are.
    """

    sequence: Sequence
    awaited: set[ChunkKey]
    chunks: dict[RequestChunk, ResidentChunk] = field(default_factory=dict)
    claims: dict[RequestChunk, Claim] = field(default_factory=dict)
    stay: Stay | None = None
    loading: bool = False
    abandoned: bool = False

    def drop_claims(self) -> None:
        """Nobody computes what was claimed and is not computed yet."""
        claims, self.claims = self.claims, {}
        for claim in claims.values():
            claim.drop()

    @property
    def takes(self) -> Misfit | None:
        """Which room to wait for KV in it takes."""
        return None if self.stay is None else self.stay.room

    def note_abandoned(self) -> None:
        """Should somebody join later, after the load has given up, it is returned to the queue."""
        self.abandoned = self.sequence.done and all(chunk.holders <= 1 for chunk in self.chunks.values())


class Admission:
    """Acquires and releases what sequences hold."""

    def __init__(self, residents: ResidentChunks, room: FillRoom, tails: Tails, sight: Sight = EVERYTHING) -> None:
        """``sight``: what rows can see."""
        self._sight = sight
        self._residents = residents
        self._room = room
        self._tails = tails
        self._pool = residents.pool
        self._evicted: list[ChunkKey] = []
        residents.on_evict.append(self._evicted.append)

    def take_evicted(self) -> tuple[ChunkKey, ...]:
        """Chunks that left the pool since the last time."""
        evicted = tuple(self._evicted)
        self._evicted.clear()
        return evicted

    def check_size(self, sequence: Sequence) -> None:
        """Raises ``Unsupported`` if the sequence could never be admitted."""
        chunk_pages = self._pages(sequence.composition.chunks, bypass=sequence.bypass)
        if chunk_pages > self._pool.chunk_pages:
            raise Unsupported(
                f"their chunks need {chunk_pages} pages of the KV pool; at most {self._pool.chunk_pages} hold chunks "
                "(raise kv-pages or chunk-page-ratio)",
                field="segments",
            )
        tail_pages, most = self._tails.most(sequence), self._tails.pages
        if tail_pages > most:
            raise Unsupported(
                f"query and answer need {tail_pages} pages of the KV pool; at most {most} hold tails (lower "
                "max_tokens, raise kv-pages or lower chunk-page-ratio)",
                field="sampling.max_tokens",
            )

    def _pages(self, chunks: Iterable[RequestChunk], *, bypass: bool) -> int:
        """Pages of chunks: one that stands in several places has one copy, except where nothing is shared."""
        lengths = {chunk.index if bypass else chunk.key: len(chunk.token_ids) for chunk in chunks}
        return sum(self._pool.pages_for(tokens) for tokens in lengths.values())

    def admit(self, sequence: Sequence, kept: Collection[Misfit] = ()) -> Fill | Misfit:
        """Holds every chunk of a sequence, its part of the room to fill in and a promise of tail pages; or nothing.

        ``kept``: rooms that it must not enter.
        """
        self._take_context_back(sequence)
        stay = self._stay_of(sequence)
        if stay is not None and (stay.room in kept or not self._room.enter(stay)):
            return stay.room
        fill = self._hold(sequence)
        if fill is None:
            self._room.stop_waiting(stay)
            return Misfit.PAGES
        fill.stay = stay
        if stay is not None:
            fill.loading = stay.loading = bool(fill.chunks)
        return fill

    def _take_context_back(self, sequence: Sequence) -> None:
        """A chunk that has to come again may be computed here: then those that went are needed as its context."""
        gone = range(sequence.chunks_gone)
        behind = [chunk for chunk in sequence.chunks_held if any(index in gone for index in chunk.context)]
        if any(self._residents.find(chunk.key) is None for chunk in behind):
            sequence.chunks_gone = 0

    def _stay_of(self, sequence: Sequence) -> Stay | None:
        """What the sequence would take of the room to fill in; None if its KV is here, or is computed with it."""
        if sequence.bypass:
            return None
        found = {chunk: self._residents.find(chunk.key) for chunk in sequence.chunks_held}
        absent = [chunk for chunk, resident in found.items() if resident is None]
        joins = any(resident is not None and not resident.ready for resident in found.values())
        if not absent and not joins:
            return None
        return Stay(self._pages(absent, bypass=False), self._tails.need(sequence), long=joins or sequence.cold)

    def _hold(self, sequence: Sequence) -> Fill | None:
        if not self._tails.promise(sequence):
            return None
        fill, before = None, (-1, -1)
        while fill is None and before != (self._residents.moves, self._residents.evictions):
            # Tried again where room was made on the way: what is reserved before runs are moved together, or before a
            # chunk is evicted, stays where it is, and may have broken the room up.
            before = self._residents.moves, self._residents.evictions
            fill = self._hold_chunks(sequence)
        if fill is None:
            self._tails.release(sequence)
        return fill

    def _hold_chunks(self, sequence: Sequence) -> Fill | None:
        """Holds the chunks that are here before it makes room for the others, lest one makes room for another."""
        chunks = sequence.chunks_held
        for chunk in chunks:
            chunk.computed = None
            sequence.note_outcome(chunk, ChunkOutcome(KVSource.COMPUTED if sequence.bypass else KVSource.DEVICE))
            chunk.resident = None if sequence.bypass else self._residents.acquire(chunk.key)
        here = [chunk.resident for chunk in chunks if chunk.resident is not None]
        fill = Fill(sequence, {resident.key for resident in here if not resident.ready})
        need = self._pages((chunk for chunk in chunks if chunk.resident is None), bypass=sequence.bypass)
        if need > self._pool.chunk_pages - self._residents.pages_held:  # then nothing is evicted
            self._let_go(sequence)
            return None
        try:
            for chunk in chunks:
                if chunk.resident is None:
                    chunk.resident = self._hold_absent(fill, chunk)
        except PoolFull:
            self._let_go(sequence)
            return None
        for resident in fill.chunks.values():
            self._residents.acquire(resident.key)
        return fill

    def _hold_absent(self, fill: Fill, chunk: RequestChunk) -> ResidentChunk:
        if fill.sequence.bypass:
            chunk.computed = 0
            return self._residents.reserve(ChunkKey(f"bypass:{uuid.uuid4()}"), len(chunk.token_ids))
        repeated = self._residents.acquire(chunk.key)  # it stands here a second time
        if repeated is not None:
            return repeated
        fill.chunks[chunk] = self._residents.reserve(chunk.key, len(chunk.token_ids))
        return fill.chunks[chunk]

    def filled(self, fill: Fill, chunk: RequestChunk) -> None:
        """A chunk's KV is all there: it can be read, by this request and by those that waited."""
        resident = fill.chunks.pop(chunk)
        resident.ready = True
        self._residents.release(resident)

    def fill_failed(self, fill: Fill) -> set[ChunkKey]:
        """What is not filled yet never will be: its chunks leave the pool with their holders. Returns their keys."""
        failed = list(fill.chunks.values())
        fill.chunks.clear()
        for resident in failed:
            self._residents.release(resident)
        return {resident.key for resident in failed}

    def release(self, sequence: Sequence) -> None:
        """Gives back the pages and holds of a sequence; what bypassed the caches leaves the pool at once."""
        self._tails.release(sequence)
        self._let_go(sequence)

    def let_unseen_go(self, sequence: Sequence) -> None:
        """Rows of a tail were launched: chunks that no later one sees may go. Harmless where none are left."""
        if not self._sight.is_limited:
            return
        first, composition = self._sight.first(sequence.next_position), sequence.composition
        while sequence.chunks_gone < len(composition.chunks):
            chunk, start = composition.chunks[sequence.chunks_gone], composition.starts[sequence.chunks_gone]
            if start + chunk.visible > first:
                return
            sequence.chunks_gone += 1
            self._let_chunk_go(chunk, bypass=sequence.bypass)

    def _let_go(self, sequence: Sequence) -> None:
        for chunk in sequence.composition.chunks:
            self._let_chunk_go(chunk, bypass=sequence.bypass)

    def _let_chunk_go(self, chunk: RequestChunk, *, bypass: bool) -> None:
        resident, chunk.resident = chunk.resident, None
        if resident is not None:
            self._residents.release(resident)
            if bypass:
                self._residents.evict(resident.key)
