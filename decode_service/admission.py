"""Admission: all the pages a request needs, or none, and who fills which chunk.

A chunk that several requests want is filled once: the first to be admitted reserves and fetches it, the
others hold it and wait. The fill itself holds the chunk too, so pages are never given away while a load
still writes to them, whatever happens to the request that asked.
"""

from __future__ import annotations

import uuid
from collections import deque
from dataclasses import dataclass, field

import torch

from chunk_store.key import ChunkKey
from decode_service.sequence import ChunkOutcome, Sequence, Source
from decode_service.source import Wanted
from engine.resident import PoolFull, ResidentChunk, ResidentChunks


class TooLarge(ValueError):
    """A request needs more pages than the pool has, even alone."""


@dataclass
class Admitted:
    """A request with its pages. ``wanted`` are the chunks it must fetch, ``awaited`` those others fetch."""

    sequence: Sequence
    wanted: list[Wanted]
    awaited: set[ChunkKey]
    fills: list[ResidentChunk] = field(default_factory=list)  # held by the fetch
    to_compute: deque[int] = field(default_factory=deque)


class Admission:
    """Acquires and releases what sequences hold. Belongs to the device thread."""

    def __init__(self, residents: ResidentChunks) -> None:
        self.residents = residents
        self.pool = residents.pool

    def check_size(self, sequence: Sequence) -> None:
        """Raises ``TooLarge`` if the sequence could never be admitted."""
        chunk_pages = sum(
            self.pool.pages_for(tokens)
            for tokens in {c.key: len(c.token_ids) for c in sequence.composition.chunks}.values()
        )
        if chunk_pages > self.pool.chunk_pages:
            raise TooLarge(
                f"segments: their chunks need {chunk_pages} pages of the KV pool; at most {self.pool.chunk_pages} hold "
                "chunks (raise kv-pages or chunk-page-ratio)"
            )
        tail_pages, most = self.pool.pages_for(sequence.tail_tokens_max), self.pool.pages - self.pool.chunk_pages
        if tail_pages > most:
            raise TooLarge(
                f"sampling.max_tokens: query and answer need {tail_pages} pages of the KV pool; at most {most} hold "
                "tails (lower max_tokens, raise kv-pages or lower chunk-page-ratio)"
            )

    def admit(self, sequence: Sequence) -> Admitted | None:
        """Holds every chunk and tail page of a sequence, or None and nothing if they do not fit now."""
        pages = self.pool.allocate_pages(self.pool.pages_for(sequence.tail_tokens_max))
        if pages is None:
            return None
        admitted = Admitted(sequence, [], set())
        try:
            for index in range(len(sequence.composition.chunks)):
                self._hold(admitted, index)
        except PoolFull:
            self._roll_back(admitted, pages)
            return None
        sequence.tail_pages = tuple(pages)
        if not sequence.bypass:
            for chunk in admitted.fills:
                self.residents.acquire(chunk.key)
        return admitted

    def _hold(self, admitted: Admitted, index: int) -> None:
        sequence = admitted.sequence
        keyed = sequence.composition.chunks[index]
        key = ChunkKey(f"bypass:{uuid.uuid4()}") if sequence.bypass else keyed.key
        chunk = self.residents.acquire(key)
        if chunk is None:
            chunk = self.residents.reserve(key, len(keyed.token_ids))
            admitted.fills.append(chunk)
            if sequence.bypass:
                admitted.to_compute.append(index)
            else:
                admitted.wanted.append(Wanted(index, run_buffers(self.residents, chunk)))
        elif not chunk.ready:
            admitted.awaited.add(key)
        sequence.chunks.append(chunk)
        sequence.outcomes.append(ChunkOutcome(Source.COMPUTED if sequence.bypass else Source.DEVICE))

    def _roll_back(self, admitted: Admitted, pages: list[int]) -> None:
        self.pool.release_pages(pages)
        for chunk in admitted.sequence.chunks:
            self.residents.release(chunk)
        admitted.sequence.chunks.clear()
        admitted.sequence.outcomes.clear()

    def filled(self, admitted: Admitted, outcomes: dict[int, ChunkOutcome]) -> None:
        """The fetch is done: its chunks can be read, by this request and by those that waited."""
        for chunk in admitted.fills:
            chunk.ready = True
            self.residents.release(chunk)
        for index, outcome in outcomes.items():
            admitted.sequence.outcomes[index] = outcome

    def fill_failed(self, admitted: Admitted) -> set[ChunkKey]:
        """The fetch failed: its chunks leave the pool with their holders. Returns their keys."""
        for chunk in admitted.fills:
            self.residents.release(chunk)
        return {chunk.key for chunk in admitted.fills}

    def all_ready(self, admitted: Admitted) -> bool:
        return all(chunk.ready for chunk in admitted.sequence.chunks)

    def release(self, sequence: Sequence) -> None:
        """Gives back the pages and holds of a sequence; what bypassed the caches leaves the pool at once."""
        self.pool.release_pages(sequence.tail_pages)
        sequence.tail_pages = ()
        for chunk in sequence.chunks:
            self.residents.release(chunk)
            if sequence.bypass:
                self.residents.evict(chunk.key)
        sequence.chunks = []


def run_buffers(residents: ResidentChunks, chunk: ResidentChunk) -> list[memoryview]:
    """The pool's memory for a chunk as bytes, parts in layout order."""
    parts = residents.pool.run_parts(chunk.run, chunk.tokens)
    return [part.reshape(-1).view(torch.uint8).numpy().data.cast("B") for part in parts]
