"""CascadePlan: which query rows of a step read which slots. Index arithmetic only; no model, no tensors.

A step packs its new tokens ("rows") of all sequences into one line. Every row attends to the chunks of its
composition, in order, and then to its own tail, causally:

    sequences        rows     chunks (slots, offset)       tail
    A: decode        0        sys@0  doc1@0                A's pages
    B: decode        1        sys@0  doc2@0  doc1@+900     B's pages
    C: prefill 3     2 3 4    sys@0                        C's pages

    reads, level 0:  sys  <- rows 0 1 2 3 4
           level 1:  doc1 <- rows 0 1 (row 1 turned back by 900)      doc2 <- row 1
    tails            A <- row 0    B <- row 1    C <- rows 2..4

One read is one pass over a chunk's bytes for all the rows that share it. ``places`` are those of the chunk in
its rows' compositions: partial results are merged in that order (onto the tail's), whatever the batch, and a
chunk is always one partial result, so folding a level changes who reads together, never what is summed.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class PlacedChunk:
    """A resident chunk in one composition: its slots, and how far from its computed place it stands."""

    first_slot: int
    tokens: int
    offset: int


@dataclass(frozen=True)
class StepSequence:
    """One sequence's share of a step: ``rows`` new tokens at ``position ..``.

    The tail holds ``tail_tokens`` tokens before the step, in ``tail_pages`` (which have room for the new
    ones); its tokens stand directly before the new ones.
    """

    chunks: tuple[PlacedChunk, ...]
    tail_pages: tuple[int, ...]
    tail_tokens: int
    rows: int
    position: int


@dataclass(frozen=True)
class ChunkRead:
    """One pass over a chunk. ``rows[i]`` is turned back by ``offsets[i]`` and yields partial result ``places[i]``."""

    first_slot: int
    tokens: int
    rows: tuple[int, ...]
    offsets: tuple[int, ...]
    places: tuple[int, ...]


@dataclass(frozen=True)
class Tail:
    """Rows ``first_row .. first_row + rows - 1`` attend causally to ``tokens_before`` + their own tokens."""

    first_row: int
    rows: int
    pages: tuple[int, ...]
    tokens_before: int


@dataclass(frozen=True)
class CascadePlan:
    """A step's reads by level (the tails are the last level), and where its rows stand.

    ``partials`` is the number of partial results a row can have: 1 + the longest composition.
    """

    levels: tuple[tuple[ChunkRead, ...], ...]
    tails: tuple[Tail, ...]
    positions: tuple[int, ...]
    slots: tuple[int, ...]
    partials: int

    def padded(self, rows: int, scratch_page: int, page_size: int) -> CascadePlan:
        """The same step with ``rows`` rows; the new ones see one token of ``scratch_page`` and nothing else."""
        have = len(self.slots)
        extra = range(have, rows)
        return CascadePlan(
            self.levels,
            (*self.tails, *(Tail(row, 1, (scratch_page,), 0) for row in extra)),
            self.positions + (0,) * len(extra),
            self.slots + (scratch_page * page_size,) * len(extra),
            self.partials,
        )

    @property
    def reads(self) -> tuple[ChunkRead, ...]:
        return tuple(read for level in self.levels for read in level)

    @property
    def tokens_read(self) -> int:
        """KV tokens that the step reads: each read once, each tail once."""
        shared = sum(read.tokens for read in self.reads)
        return shared + sum(t.tokens_before + t.rows for t in self.tails)

    def level_of(self, first_slot: int, row: int) -> int:
        """The level in which ``row`` reads the chunk at ``first_slot``; the tails' level if it reads none there."""
        for index, level in enumerate(self.levels):
            if any(read.first_slot == first_slot and row in read.rows for read in level):
                return index
        return len(self.levels)


Levels = tuple[tuple[ChunkRead, ...], ...]
_Pairs = tuple[list[int], list[int], list[int]]  # of one chunk: rows, offsets, places


def plan_levels(sequences: Sequence[StepSequence], *, max_cascade_levels: int) -> Levels:
    """Groups the (chunk, row) pairs of a step into reads, and the reads into levels.

    Chunks that more sequences read come first. A row takes part in at most ``max_cascade_levels - 1`` levels
    of shared reads (the tails are one more); its further chunks, and those nobody shares, are folded: read
    for that sequence alone, in the last of its levels. Depends only on compositions and row counts, so it is
    kept between steps.
    """
    if max_cascade_levels < 1:
        raise ValueError(f"max_cascade_levels: {max_cascade_levels} must be at least 1 (the tails)")
    readers = _readers(sequences)
    ranks = _ranks(readers)
    shared: dict[tuple[int, int], _Pairs] = defaultdict(lambda: ([], [], []))
    levels_of: dict[tuple[int, int], int] = {}
    folded: list[tuple[int, ChunkRead]] = []
    first_row = 0
    for sequence in sequences:
        level_of = _levels_of_sequence(sequence, ranks, max_cascade_levels - 1)
        deepest = max(level_of.values(), default=0)
        count = sequence.rows
        rows = range(first_row, first_row + count)
        for index, chunk in enumerate(sequence.chunks):
            place = (chunk.first_slot, chunk.tokens)
            level = level_of.get(place)
            if level is None:
                folded.append((deepest, ChunkRead(*place, tuple(rows), (chunk.offset,) * count, (index,) * count)))
                continue
            of_rows, of_offsets, of_places = shared[place]
            of_rows += rows
            of_offsets += [chunk.offset] * count
            of_places += [index] * count
            levels_of[place] = max(level, levels_of.get(place, 0))
        first_row += count
    reads = [(levels_of[place], ChunkRead(*place, *map(tuple, pairs))) for place, pairs in shared.items()] + folded
    depth = 1 + max((level for level, _ in reads), default=-1)
    return tuple(tuple(read for level, read in reads if level == wanted) for wanted in range(depth))


def _readers(sequences: Sequence[StepSequence]) -> dict[tuple[int, int], frozenset[int]]:
    readers: dict[tuple[int, int], set[int]] = defaultdict(set)
    for index, sequence in enumerate(sequences):
        for chunk in sequence.chunks:
            readers[chunk.first_slot, chunk.tokens].add(index)
    return {place: frozenset(who) for place, who in readers.items()}


def _ranks(readers: dict[tuple[int, int], frozenset[int]]) -> dict[tuple[int, int], int]:
    """Of each chunk with several readers the rank of its set of readers: the most shared sets come first."""
    sets = sorted({who for who in readers.values() if len(who) > 1}, key=lambda who: (-len(who), sorted(who)))
    rank_of = {who: rank for rank, who in enumerate(sets)}
    return {place: rank_of[who] for place, who in readers.items() if who in rank_of}


def _levels_of_sequence(
    sequence: StepSequence, ranks: dict[tuple[int, int], int], levels_max: int
) -> dict[tuple[int, int], int]:
    """The level of each chunk this sequence reads together with others; absent: folded.

    Chunks with the same set of readers, which have one rank, are one level.
    """
    places = [(chunk.first_slot, chunk.tokens) for chunk in sequence.chunks]
    shared = [place for place in places if place in ranks]
    kept = {rank: level for level, rank in enumerate(sorted({ranks[place] for place in shared})[:levels_max])}
    return {place: kept[ranks[place]] for place in shared if ranks[place] in kept}


def plan_step(sequences: Sequence[StepSequence], levels: Levels, *, page_size: int) -> CascadePlan:
    """Completes ``levels`` (of the same compositions and row counts) with this step's tails and slots."""
    tails: list[Tail] = []
    positions: list[int] = []
    slots: list[int] = []
    first_row = 0
    for sequence in sequences:
        end = sequence.tail_tokens + sequence.rows
        if end > len(sequence.tail_pages) * page_size:
            raise ValueError(f"tail_pages: {len(sequence.tail_pages)} pages of {page_size} do not hold {end} tokens")
        tails.append(Tail(first_row, sequence.rows, sequence.tail_pages, sequence.tail_tokens))
        if sequence.rows == 1:
            positions.append(sequence.position)
            slots.append(sequence.tail_pages[sequence.tail_tokens // page_size] * page_size + (end - 1) % page_size)
        else:
            positions += range(sequence.position, sequence.position + sequence.rows)
            slots += [
                sequence.tail_pages[at // page_size] * page_size + at % page_size
                for at in range(sequence.tail_tokens, end)
            ]
        first_row += sequence.rows
    partials = 1 + max((len(sequence.chunks) for sequence in sequences), default=0)
    return CascadePlan(levels, tuple(tails), tuple(positions), tuple(slots), partials)
