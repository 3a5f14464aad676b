"""What the scheduler plans: a list of (request, rows), and what comes in and goes out for it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from chunk_store.key import ChunkKey
from decode_service.admission import Fill
from decode_service.prompt.request_chunk import RequestChunk
from decode_service.sequence import Sequence


@dataclass(frozen=True)
class Rows:
    """One request's rows of a step: ``count`` tokens from ``first`` on, of its tail or of a chunk computed here."""

    sequence: Sequence
    first: int
    count: int
    chunk: RequestChunk | None = None

    @property
    def decodes(self) -> bool:
        """Whether this is the row of a generated token."""
        return self.chunk is None and self.first >= len(self.sequence.composition.tail)

    @property
    def last_of_prompt(self) -> bool:
        """Whether the request's first token is drawn from the last of these rows."""
        return self.chunk is None and self.first + self.count == len(self.sequence.composition.tail)


@dataclass(frozen=True)
class StepPlan:
    """What happens next: requests that came in with their pages, chunks that left for them, and the rows to run."""

    admitted: tuple[Fill, ...]
    evicted: tuple[ChunkKey, ...]
    rows: tuple[Rows, ...]

    @property
    def loads(self) -> list[Fill]:
        """What to load; each ends with ``loaded``, ``load_failed`` or ``put_off``."""
        return [fill for fill in self.admitted if fill.loading]

    @property
    def pieces(self) -> list[Rows]:
        return [rows for rows in self.rows if not rows.decodes]

    @property
    def decodes(self) -> list[Rows]:
        return [rows for rows in self.rows if rows.decodes]


def next_pieces(sequences: Iterable[Sequence], rows_max: int) -> list[Rows]:
    """Rows of prompts, in the order of their requests: at least one piece, at most ``rows_max`` rows in all."""
    pieces: list[Rows] = []
    left = rows_max
    for sequence in sequences:
        for piece in _pieces_of(sequence, rows_max):
            if piece.count > left and pieces:
                return pieces
            pieces.append(piece)
            left -= piece.count
    return pieces


def _pieces_of(sequence: Sequence, rows_max: int) -> Iterator[Rows]:
    """All that a request still has to compute before its first token, chunks before the tail that attends to them."""
    for chunk in sequence.composition.chunks:
        if chunk.computed is not None:
            tokens = len(chunk.token_ids)
            for first in range(chunk.computed, tokens, rows_max):
                yield Rows(sequence, first, min(rows_max, tokens - first), chunk)
    tail = len(sequence.composition.tail)
    for first in range(sequence.tail_tokens, tail, rows_max):
        yield Rows(sequence, first, min(rows_max, tail - first))
