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

Layers with a window compute ``CascadePlan.seen_through``: the same plan without what its rows do not see. A row that
sees a part of a chunk has that part's first token with its pair; parts that it does not see are not there.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Window:
    """What a layer lets a row at ``position`` see: of the positions up to its own the last ``tokens``, or, if
    ``chunked``, those of its own block of ``tokens``."""

    tokens: int
    chunked: bool = False

    def first(self, position: int) -> int:
        """The first position that a row at ``position`` sees."""
        return position // self.tokens * self.tokens if self.chunked else max(0, position - self.tokens + 1)


@dataclass(frozen=True)
class PlacedChunk:
    """A resident chunk in one composition: its slots, how far from its computed place it stands, and where.

    ``start`` is the position of its first token; it was computed at ``start - offset``.
    """

    first_slot: int
    tokens: int
    offset: int
    start: int


def behind_each_other(chunks: Iterable[tuple[int, int, int]]) -> tuple[PlacedChunk, ...]:
    """Chunks (first slot, tokens, offset) that stand from position 0 on without gaps, as those of a composition do."""
    placed = []
    start = 0
    for first_slot, tokens, offset in chunks:
        placed.append(PlacedChunk(first_slot, tokens, offset, start))
        start += tokens
    return tuple(placed)


@dataclass(frozen=True)
class StepSequence:
    """One sequence's share of a step: ``rows`` new tokens at ``position ..``.

    The tail holds ``tail_tokens`` tokens before the step, in ``tail_pages`` (which have room for the new
    ones); its tokens stand directly before the new ones. Where every layer has a window, chunks that no row sees
    any more may be left out, and pages of the tail may be others'.
    """

    chunks: tuple[PlacedChunk, ...]
    tail_pages: tuple[int, ...]
    tail_tokens: int
    rows: int
    position: int


@dataclass(frozen=True)
class ChunkRead:
    """One pass over a chunk. ``rows[i]`` is turned back by ``offsets[i]`` and yields partial result ``places[i]``.

    To that row the chunk begins at position ``starts[i]``, and it sees the chunk's tokens from ``firsts[i]`` on (empty:
    all of them, for every row).
    """

    first_slot: int
    tokens: int
    rows: tuple[int, ...]
    offsets: tuple[int, ...]
    places: tuple[int, ...]
    starts: tuple[int, ...]
    firsts: tuple[int, ...] = ()


@dataclass(frozen=True)
class Tail:
    """Rows ``first_row .. first_row + rows - 1`` attend causally to ``tokens_before`` + their own tokens.

    Row i of them sees the tail's tokens from ``first[i]`` on (empty: all, every row).
    """

    first_row: int
    rows: int
    pages: tuple[int, ...]
    tokens_before: int
    first: tuple[int, ...] = ()


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
        """KV tokens that the step reads: each read once, each tail once, from the first that one of its rows sees."""
        shared = sum(read.tokens - min(read.firsts, default=0) for read in self.reads)
        return shared + sum(t.tokens_before + t.rows - min(t.first, default=0) for t in self.tails)

    def seen_through(self, window: Window | None) -> CascadePlan:
        """The plan that a layer with ``window`` computes: without what its rows do not see.

        Pairs that see nothing of a chunk are gone, and reads and levels without pairs; the others have their first
        tokens where one is above 0. Places stay what they are. The same object where every row sees everything.
        """
        seen = [0] if window is None else [window.first(position) for position in self.positions]
        if not any(seen):
            return self
        levels = tuple(tuple(kept for read in level if (kept := _seen_read(read, seen))) for level in self.levels)
        # The same levels are the same object: what is made of them for a step may be kept for the next.
        levels = self.levels if levels == self.levels else tuple(level for level in levels if level)
        return replace(self, levels=levels, tails=tuple(_seen_tail(tail, seen, self.positions) for tail in self.tails))

    def level_of(self, first_slot: int, row: int) -> int:
        """The level in which ``row`` reads the chunk at ``first_slot``; the tails' level if it reads none there."""
        for index, level in enumerate(self.levels):
            if any(read.first_slot == first_slot and row in read.rows for read in level):
                return index
        return len(self.levels)


Levels = tuple[tuple[ChunkRead, ...], ...]
_Pairs = tuple[list[int], list[int], list[int], list[int]]  # of one chunk: rows, offsets, places, starts


def _seen_read(read: ChunkRead, seen: Sequence[int]) -> ChunkRead | None:
    """What the rows, which see the positions from ``seen[row]`` on, read of a chunk; None if nothing."""
    firsts = [seen[row] - start for row, start in zip(read.rows, read.starts, strict=True)]
    if max(firsts) <= 0:
        return read
    if max(firsts) < read.tokens:
        return replace(read, firsts=tuple([max(first, 0) for first in firsts]))
    kept = [i for i, first in enumerate(firsts) if first < read.tokens]
    if not kept:
        return None
    rows, offsets, places, starts = (
        tuple([values[i] for i in kept]) for values in (read.rows, read.offsets, read.places, read.starts)
    )
    own = tuple([max(firsts[i], 0) for i in kept])
    return ChunkRead(read.first_slot, read.tokens, rows, offsets, places, starts, own if any(own) else ())


def _seen_tail(tail: Tail, seen: Sequence[int], positions: Sequence[int]) -> Tail:
    start = positions[tail.first_row] - tail.tokens_before
    last = seen[tail.first_row + tail.rows - 1] - start  # rows of one tail see ever later positions
    if last <= 0:
        return tail
    rows = range(tail.first_row, tail.first_row + tail.rows)
    return replace(tail, first=tuple([max(seen[row] - start, 0) for row in rows]))


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
    shared: dict[tuple[int, int], _Pairs] = defaultdict(lambda: ([], [], [], []))
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
                same = ((chunk.offset,) * count, (index,) * count, (chunk.start,) * count)
                folded.append((deepest, ChunkRead(*place, tuple(rows), *same)))
                continue
            of_rows, of_offsets, of_places, of_starts = shared[place]
            of_rows += rows
            of_offsets += [chunk.offset] * count
            of_places += [index] * count
            of_starts += [chunk.start] * count
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
