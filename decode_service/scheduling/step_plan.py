"""What the scheduler plans: a list of (request, rows), and what comes in and goes out for it.

Rows of a step are of two kinds. A piece that is ``alone`` is a forward of its own, cut at multiples of the runner's
``piece_tokens``; everything else is packed into one step: a row of each request that decodes, then slices of prompts
and of chunks that are computed here. Which kind a chunk or a tail is, the runner says, by its length alone.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass
from typing import Protocol

from chunk_store.key import ChunkKey
from decode_service.prompt.request_chunk import RequestChunk
from decode_service.scheduling.admission import Fill
from decode_service.scheduling.line import cost_in_rows
from decode_service.scheduling.sequence import Sequence, State
from decode_service.scheduling.tails import TailMove
from engine.run.room import StepRoom

PagesFor = Callable[[Sequence, int], int]


class Forwards(Protocol):
    """What is asked of a runner before anything runs (see ``engine.run.protocol``)."""

    @property
    def piece_tokens(self) -> int: ...

    def alone(self, tokens: int, *, chunk: bool) -> bool: ...

    @property
    def slots(self) -> int: ...

    def room(self, *, decoding: bool) -> StepRoom: ...


@dataclass(frozen=True)
class Rows:
    """One request's rows of a step: ``count`` tokens from ``first`` on, of its tail or of a chunk computed here.

    ``forced``: of a row that decodes, the tokens of those behind the first (see ``jumps.py``).
    ``also``: other answers to the same prompt, whose tails and first tokens come of these rows (see ``answers.py``);
    their tails have the pages of this one from ``copied_from`` on.
    """

    sequence: Sequence
    first: int
    count: int
    chunk: RequestChunk | None = None
    alone: bool = False
    also: tuple[Sequence, ...] = ()
    forced: tuple[int, ...] = ()
    copied_from: int = 0

    @property
    def decodes(self) -> bool:
        """Whether this is the row of a generated token."""
        return self.chunk is None and self.first >= self.sequence.known_tokens

    @property
    def last_of_prompt(self) -> bool:
        """Whether the request's first token is drawn from the last of these rows."""
        sequence = self.sequence
        return self.chunk is None and not sequence.resumed and self.first + self.count == len(sequence.composition.tail)

    @property
    def masked(self) -> list[Sequence]:
        """For whom a token is drawn behind these rows that a grammar has to allow, in the order of the draws."""
        if not self.decodes and not self.last_of_prompt:
            return []
        return [sequence for sequence in (self.sequence, *self.also) if sequence.grammar is not None]

    @property
    def context(self) -> list[int]:
        """Tokens of each chunk that the rows attend to."""
        chunks = self.sequence.composition.chunks
        if self.chunk is not None:
            return [len(chunks[index].token_ids) for index in self.chunk.context]
        return [chunk.visible for chunk in self.sequence.chunks_held if chunk.visible]


@dataclass(frozen=True)
class StepPlan:
    """What happens next: requests that came in with their pages, chunks that left for them, and the rows to run.

    ``moves`` of tails come first, in their order. ``opened`` are the requests that were given a sampling slot.
    ``given_back``: pages that tails have left behind since the last plan.
    """

    admitted: tuple[Fill, ...]
    evicted: tuple[ChunkKey, ...]
    moves: tuple[TailMove, ...]
    opened: tuple[Sequence, ...]
    rows: tuple[Rows, ...]
    given_back: int = 0

    @property
    def loads(self) -> list[Fill]:
        """What to load; each ends with ``loaded``, ``load_failed`` or ``put_off``."""
        return [fill for fill in self.admitted if fill.loading]

    @property
    def alone(self) -> list[Rows]:
        """Forwards of their own, one after the other."""
        return [rows for rows in self.rows if rows.alone]

    @property
    def packed(self) -> list[Rows]:
        """The rows of one step."""
        return [rows for rows in self.rows if not rows.alone]


def next_pieces(sequences: Iterable[Sequence], forwards: Forwards) -> list[Rows]:
    """What runs alone, in the order of its requests: at least one piece, what ``piece_tokens`` rows cost at most."""
    rows_max = forwards.piece_tokens
    pieces: list[Rows] = []
    left = rows_max
    for sequence in sequences:
        before: set[RequestChunk] = set()  # whose last piece is among these
        for rows in _unfinished(sequence):
            if not _is_alone(rows, forwards) or not _has_its_context(rows, before):
                continue
            end = min(rows.first + rows.count, _piece_end(rows))
            for first in range(rows.first, end, rows_max):
                count = min(rows_max, end - first)
                cost = cost_in_rows(count, rows_max)
                if cost > left and pieces:
                    return pieces
                pieces.append(Rows(sequence, first, count, rows.chunk, alone=True))
                left -= cost
            if rows.chunk is not None:
                before.add(rows.chunk)
    return pieces


def _as_many(_: Sequence, tokens: int) -> int:
    return tokens


def next_slices(
    sequences: Iterable[Sequence],
    forwards: Forwards,
    room: StepRoom,
    drawing: int = 0,
    pages_for: PagesFor = _as_many,
) -> list[Rows]:
    """What shares a step, in the order of its requests, as far as there is room.

    What stands behind a chunk finds its KV in the pool once that was launched: it comes a step later. ``drawing``: how
    many have a slot. Rows that are scored take the places of rows that draw, of which there are as many as slots: one
    that its own request has, and of those that nobody has as many as are left. ``pages_for``: how many tokens a tail
    may have, of so many that it is to have.
    """
    slices: list[Rows] = []
    spare = forwards.slots - drawing
    for sequence in sequences:
        for rows in _unfinished(sequence):
            if _is_alone(rows, forwards) or not _has_its_context(rows):
                continue
            most = rows.count if sequence.scores is None else min(rows.count, 1 + spare)
            most = min(most, room.rows)
            if rows.chunk is None:
                most = pages_for(sequence, rows.first + most) - rows.first
            count = room.take(rows.context, rows.first, most)
            if count:
                slices.append(Rows(sequence, rows.first, count, rows.chunk))
            if count < most or not room.rows:
                return slices  # whoever comes later waits, however little it asks for
            if sequence.scores is not None:
                spare -= count - 1
                break  # one slice a step: it has one place of its own
    return slices


def next_again(sequences: Iterable[Sequence], forwards: Forwards) -> list[Rows]:
    """A row of each answer that goes on where rows have the bits of those that decode only one at a time beside them.

    Its tokens are known, so nothing is drawn: the rows run again that ran before its pages were given up.
    """
    return [
        Rows(sequence, sequence.tail_tokens, 1)
        for sequence in sequences
        if len(sequence.composition.tail) <= sequence.tail_tokens < sequence.known_tokens
        and forwards.alone(len(sequence.composition.tail), chunk=False)
    ]


def can_compute(sequence: Sequence) -> bool:
    """Whether a request that still waits for KV has rows of chunks that may run now."""
    return any(_has_its_context(rows) for rows in _unfinished(sequence))


def _unfinished(sequence: Sequence) -> Iterator[Rows]:
    """All that a request computes before its first token, chunks before what attends to them.

    While some of its KV is still on its way that is chunks alone.
    """
    for chunk in sequence.composition.chunks:
        if chunk.computed is not None and chunk.computed < len(chunk.token_ids):
            yield Rows(sequence, chunk.computed, len(chunk.token_ids) - chunk.computed, chunk)
    known = sequence.known_tokens
    if sequence.tail_tokens < known and sequence.state is not State.LOADING:
        yield Rows(sequence, sequence.tail_tokens, known - sequence.tail_tokens)


def _piece_end(rows: Rows) -> int:
    """Where what runs alone ends: what was generated behind a query never did."""
    return len(rows.sequence.composition.tail) if rows.chunk is None else len(rows.chunk.token_ids)


def _has_its_context(rows: Rows, before: Collection[RequestChunk] = ()) -> bool:
    """Whether what the rows attend to is in the pool once what is ``before`` them has run."""
    chunks = rows.sequence.composition.chunks
    behind = chunks if rows.chunk is None else (chunks[index] for index in rows.chunk.context)
    return all(chunk in before or _is_there(chunk, before) for chunk in behind)


def _is_there(chunk: RequestChunk, before: Collection[RequestChunk]) -> bool:
    if chunk.computed is not None:
        return chunk.computed == len(chunk.token_ids)
    # One that stands here a second time is computed where it stands first.
    return chunk.resident is None or chunk.resident.ready or any(chunk.key == other.key for other in before)


def _is_alone(rows: Rows, forwards: Forwards) -> bool:
    tokens = len(rows.sequence.composition.tail) if rows.chunk is None else len(rows.chunk.token_ids)
    return forwards.alone(tokens, chunk=rows.chunk is not None)
