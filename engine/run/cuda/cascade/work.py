"""Work lists of the cascade kernels: a plan as int32 records. NumPy only; knows no device.

A *pair* is a (chunk, row) the plan wants attended; its query heads of one KV head are *packed rows*. An item is
one pass of a tile of packed rows over one split of one chunk or tail, for every KV head:

    pairs of a chunk   p0          p1          p2          ...        (row, offset, limit, partial of split 0, first)
    packed rows        0 1 2 3     4 5 6 7     8 9 10 11   ...        heads per KV head: 4
    tiles              |---- tile 0, packed0 = 0 ----|---- tile 1 ...
    splits             | 0 .. 2047 | 2048 .. 4095 | ...               counted from the chunk's own start
    partials of row r  shared: [chunk 0: split 0, 1 ..][chunk 1: ..]  tail: [split 0 ..]

Where a chunk is split depends on its length alone, and a row's partials lie in the order of its composition, so
who else is in the step changes neither what is summed nor in which order. A row sees the tokens from ``first`` up to
its ``limit``; it has no partials of splits of which it sees nothing, and items begin at the first token that a row of
their tile sees. Two blobs share one int32 buffer:

    static  [header | items by tile class | pairs]                              while compositions last
    dynamic [header | rows | items by tile class | pairs (the rows) | positions | pages]

    header  0: rows   1 + c: items of class c   9 + c: where they begin   17, 18: where positions and page 0 are
    rows    of each row: its first shared partial, how many, its tail's first partial, how many
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import chain

import numpy as np
import numpy.typing as npt

from engine.plan import CascadePlan
from engine.run.cuda.cascade.reads import Ints, PairReads

Tiles = tuple[tuple[int, int], ...]

HEADER = 24  # ints
ITEM = 9  # ints: pairs at, packed row, packed rows of the group, source, begin, full end, end, split, full begin
PAIR = 5  # ints: row, offset, limit, where the partial of split 0 is or would be, first
ROW = 4  # ints: first shared partial, shared partials, first tail partial, tail partials
AT_COUNTS, AT_ITEMS, AT_POSITIONS, AT_PAGES = 1, 9, 17, 18
CLASSES_MAX = 8


class WorkTooLarge(ValueError):
    """A plan does not fit the buffers that were allocated for the largest one."""


@dataclass(frozen=True)
class SplitRule:
    """Tokens of a split, by the length of what is split and nothing else."""

    chunk: tuple[tuple[int, int], ...] = ((0, 1024), (2049, 2048), (16384, 4096), (65536, 8192))  # (from tokens, split)
    tail: int = 1024

    def chunk_splits(self, tokens: Ints) -> Ints:
        """Tokens of each split of chunks of ``tokens`` tokens."""
        starts, splits = (np.array(column, np.int32) for column in zip(*self.chunk, strict=True))
        return splits[np.searchsorted(starts, tokens, side="right") - 1]


@dataclass(frozen=True)
class Limits:
    """The largest step: sizes of the device buffers, which are allocated once.

    ``rows`` new tokens, ``pairs`` (chunk, row) pairs, ``items`` of each of the two blobs, ``pages`` of all tails
    together, ``partials`` of all rows together (splits x pairs, chunks and tails each), ``line`` integers of the
    caller's own, which lie between the two blobs.
    """

    rows: int = 256
    pairs: int = 2048
    items: int = 8192
    pages: int = 16384
    partials: int = 8192
    line: int = 0

    @property
    def static_ints(self) -> int:
        """Where the dynamic blob begins."""
        return HEADER + self.items * ITEM + self.pairs * PAIR + self.line

    @property
    def dynamic_ints(self) -> int:
        return HEADER + self.items * ITEM + self.rows * (ROW + PAIR + 1) + self.pages


@dataclass(frozen=True)
class ListShape:
    """What the lists depend on beside the plan: query heads per KV head, tile classes, splits.

    Tiles are (packed rows, index of the class), ascending: of chunks, of tails with one new row, and of tails with
    several.
    """

    ratio: int
    chunk_tiles: Tiles
    row_tiles: Tiles
    long_tiles: Tiles
    splits: SplitRule
    limits: Limits

    def __post_init__(self) -> None:
        for tiles in (self.chunk_tiles, self.row_tiles, self.long_tiles):
            heights = [rows for rows, _ in tiles]
            if heights != sorted(set(heights)):
                raise ValueError(f"tiles: {tiles} must have ascending heights")
            if any(index >= CLASSES_MAX for _, index in tiles):
                raise ValueError(f"tiles: at most {CLASSES_MAX} classes")
            if not tiles:
                raise ValueError("tiles: chunks, tails with one new row and tails with several need a class each")


@dataclass(frozen=True)
class _Groups:
    """Pairs that read the same tokens; arrays over groups. ``source`` is the first slot, or ~(page index)."""

    pair_at: Ints  # index into the blob of the group's first pair
    pairs: Ints
    source: Ints
    tokens: Ints
    split: Ints
    visible: Ints  # where what the group's first pair sees ends; each later pair sees ``step`` more
    step: int
    firsts: Ints | None = None  # the first token that each pair sees, in the order of the blob; None: token 0, all

    @property
    def pair(self) -> Ints:
        """The number of each group's first pair among all pairs of the blob."""
        return self.pair_at // PAIR


@dataclass(frozen=True)
class SharedLists:
    """The static blob, and where each row's shared partials begin (rows + 1)."""

    blob: Ints
    row_first: Ints


def shared_lists(reads: PairReads, rows: int, shape: ListShape) -> SharedLists:
    """The static lists of ``reads`` in a step of ``rows`` rows. Raises ``WorkTooLarge``."""
    tokens, count = reads.tokens, reads.count
    split = shape.splits.chunk_splits(tokens)
    pairs, row_first = _shared_pairs(reads, rows, split)
    _check("pairs", len(pairs), shape.limits.pairs)
    _check("rows", rows, shape.limits.rows)
    _check("partials", int(row_first[-1]), shape.limits.partials)
    groups = _Groups(_starts(count)[:-1] * PAIR, count, reads.source, tokens, split, tokens, 0, reads.firsts)
    header, items = _items(groups, shape, at=HEADER)
    header[0] = rows
    return SharedLists(np.concatenate((header, items, pairs.reshape(-1))), row_first)


def tail_lists(
    plan: CascadePlan, shared: SharedLists, shape: ListShape, page_size: int, seen: Ints | None = None
) -> Ints:
    """The dynamic blob of a plan: its rows, tails, positions and pages. Raises ``WorkTooLarge``.

    ``seen``: the first position that each row sees; None: every row sees everything.
    """
    tails, rows, size = plan.tails, len(plan.slots), shape.splits.tail
    numbers = [(tail.first_row, tail.rows, tail.tokens_before) for tail in tails]
    first, count, before = np.ascontiguousarray(np.array(numbers, np.int32).reshape(-1, 3).T)
    # Steps that decode, one row a tail, are most of all, and the host's time is short.
    owned = first if len(tails) == rows else _ranges(first, count)
    visible = before + 1 if len(tails) == rows else np.repeat(before, count) + _ranges(np.zeros_like(count), count) + 1
    positions = np.array(plan.positions, np.int32)
    firsts = None
    if seen is not None:
        firsts = np.zeros(rows, np.int32)
        firsts[owned] = np.maximum(seen[owned] - np.repeat(positions[first] - before, count), 0)
    splits_of_row = np.zeros(rows, np.int32)
    splits_of_row[owned] = -(-visible // size)
    if firsts is not None:
        splits_of_row -= firsts // size
    row_first = _starts(splits_of_row)
    pages = _pages_of(plan, None if firsts is None else firsts[first], page_size)
    _check("rows", rows, shape.limits.rows)
    _check("pages", len(pages.pages), shape.limits.pages)
    _check("partials", int(row_first[-1]), shape.limits.partials)
    records = np.empty((rows, ROW), np.int32)
    records[:, 0], records[:, 1] = shared.row_first[:-1], np.diff(shared.row_first)
    records[:, 2], records[:, 3] = row_first[:-1] + shape.limits.partials, splits_of_row
    pairs = np.zeros((rows, PAIR), np.int32)
    pairs[:, 0], pairs[:, 3] = np.arange(rows), records[:, 2]
    pairs[owned, 2] = visible
    if firsts is not None:
        pairs[:, 3] -= firsts // size
        pairs[:, 4] = firsts
    at = shape.limits.static_ints + HEADER + rows * ROW
    source = ~pages.page_0
    if len(tails) < rows:
        run = pages.runs(before + count, page_size)
        source = np.where((run >= 0) & (count > 1), run, source).astype(np.int32)
    split = np.full(len(tails), size, np.int32)
    groups = _Groups(first * PAIR, count, source, before + count, split, before + 1, 1, firsts)
    header, items = _items(groups, shape, at=at)
    header[0] = rows
    header[AT_POSITIONS] = at + len(items) + rows * PAIR
    header[AT_PAGES] = header[AT_POSITIONS] + rows - pages.ahead
    return np.concatenate((header, records.reshape(-1), items, pairs.reshape(-1), positions, pages.pages))


def _shared_pairs(reads: PairReads, rows: int, split: Ints) -> tuple[Ints, Ints]:
    """Pair records (pairs, PAIR), read by read, and where each row's partials begin (rows + 1)."""
    pairs = np.zeros((len(reads.row), PAIR), np.int32)
    pairs[:, 0], pairs[:, 1], pairs[:, 2] = reads.row, reads.offset, np.repeat(reads.tokens, reads.count)
    splits_of_pair = np.repeat(-(-reads.tokens // split), reads.count)
    hidden: Ints | int = 0  # splits before the first one that a pair sees some of
    if reads.firsts is not None:
        pairs[:, 4] = reads.firsts
        hidden = reads.firsts // np.repeat(split, reads.count)
        splits_of_pair = splits_of_pair - hidden
    order = np.lexsort((reads.place, reads.row))
    pairs[order, 3] = _starts(splits_of_pair[order])[:-1]
    pairs[:, 3] -= hidden
    row_splits = np.bincount(reads.row, weights=splits_of_pair, minlength=rows)
    return pairs, _starts(row_splits.astype(np.int32))


@dataclass(frozen=True)
class _Pages:
    """The pages of all tails from the first that a row of theirs sees on, in one line.

    ``page_0``: where in it the page of each tail's token 0 is, or would be, ``ahead`` added so that none is negative.
    """

    pages: Ints
    begins: Ints  # where in the line those of each tail begin, and the total
    skipped: Ints | int  # of each tail
    page_0: Ints
    ahead: int

    def runs(self, tokens: Ints, page_size: int) -> Ints:
        """The slot of each tail's token 0, or where it would be; -1 where its ``tokens`` tokens, as far as they are
        seen, have no neighbouring slots."""
        jumps = np.zeros(len(self.pages) + 1, np.int32)
        np.cumsum(np.diff(self.pages) != 1, out=jumps[1:-1])
        begins = self.begins[:-1]
        last = begins + (tokens - 1) // page_size - self.skipped
        return np.where(jumps[last] == jumps[begins], (self.pages[begins] - self.skipped) * page_size, -1)


def _pages_of(plan: CascadePlan, firsts: Ints | None, page_size: int) -> _Pages:
    """``firsts``: the first token of each tail that one of its rows sees; None: token 0 of each."""
    if firsts is None:
        seen = [tail.pages for tail in plan.tails]
        skipped: Ints | int = 0
    else:
        skipped = firsts // page_size
        seen = [tail.pages[skip:] for tail, skip in zip(plan.tails, skipped.tolist(), strict=True)]
    begins = _starts(np.fromiter(map(len, seen), np.int32, len(seen)))
    pages = np.fromiter(chain.from_iterable(seen), np.int32, int(begins[-1]))
    page_0 = begins[:-1] - skipped
    ahead = max(0, -int(page_0.min(initial=0)))
    return _Pages(pages, begins, skipped, page_0 + ahead, ahead)


def _items(groups: _Groups, shape: ListShape, *, at: int) -> tuple[Ints, Ints]:
    """A header and the items, which begin at ``at`` in the buffer and are followed by the pairs."""
    packed = groups.pairs * shape.ratio
    tallest = np.full(len(packed), shape.chunk_tiles[-1][0], np.int32)
    if groups.step:
        tallest = np.where(groups.pairs == 1, shape.row_tiles[-1][0], shape.long_tiles[-1][0]).astype(np.int32)
    tile_counts = -(-packed // tallest)
    split_counts = -(-groups.tokens // groups.split)
    hidden = _hidden_splits(groups)
    units = tile_counts * (split_counts - hidden)
    group = np.repeat(np.arange(len(packed)), units)
    local = _ranges(np.zeros_like(packed), units)
    split, tile = local // tile_counts[group], local % tile_counts[group]
    if groups.firsts is not None:
        split += hidden[group]
    row0 = tile * tallest[group]
    left = np.minimum(packed[group] - row0, tallest[group])
    first_pair, last_pair = row0 // shape.ratio, (row0 + left - 1) // shape.ratio
    begin = split * groups.split[group]
    end = np.minimum(groups.tokens[group], begin + groups.split[group])
    fields = np.empty((len(group), ITEM), np.int32)
    fields[:, 1], fields[:, 2], fields[:, 3] = row0, packed[group], groups.source[group]
    fields[:, 4], fields[:, 7], fields[:, 8] = begin, split, begin
    if groups.firsts is not None:
        least, most = _extremes(groups.firsts, groups.pair[group] + first_pair, groups.pair[group] + last_pair)
        fields[:, 4] = begin = np.clip(least, begin, end)
        fields[:, 8] = np.clip(most, begin, end)
    fields[:, 5] = np.clip(groups.visible[group] + groups.step * first_pair, begin, end)
    fields[:, 6] = np.clip(groups.visible[group] + groups.step * last_pair, begin, end)
    kind = _class_of(shape.long_tiles if groups.step else shape.chunk_tiles, left)
    if groups.step:
        kind = np.where(groups.pairs[group] == 1, _class_of(shape.row_tiles, left), kind)
    if groups.step or groups.firsts is not None:
        seen = fields[:, 6] > begin  # by some row of the tile
        fields, kind, group = fields[seen], kind[seen], group[seen]
    _check("items", len(fields), shape.limits.items)
    fields[:, 0] = at + len(fields) * ITEM + groups.pair_at[group]
    order = np.lexsort((fields[:, 4] - fields[:, 6], kind)) if groups.step else np.argsort(kind, kind="stable")
    counts = np.bincount(kind, minlength=CLASSES_MAX)
    header = np.zeros(HEADER, np.int32)
    header[AT_COUNTS : AT_COUNTS + CLASSES_MAX] = counts
    header[AT_ITEMS : AT_ITEMS + CLASSES_MAX] = at + _starts(counts)[:-1] * ITEM
    return header, fields[order].reshape(-1)


def _hidden_splits(groups: _Groups) -> Ints:
    """Splits of each group before the first one that one of its pairs sees some of."""
    if groups.firsts is None or not len(groups.pairs):
        return np.zeros(len(groups.pairs), np.int32)
    least, _ = _extremes(groups.firsts, groups.pair, groups.pair + groups.pairs - 1)
    return least // groups.split


def _extremes(values: Ints, first: Ints, last: Ints) -> tuple[Ints, Ints]:
    """The least and the largest of values[first[i]] .. values[last[i]], each i."""
    ends = np.empty(2 * len(first), np.intp)
    ends[::2], ends[1::2] = first, last + 1
    padded = np.append(values, np.int32(0))
    return np.minimum.reduceat(padded, ends)[::2], np.maximum.reduceat(padded, ends)[::2]


def _class_of(tiles: Tiles, rows: Ints) -> Ints:
    """The class of the lowest tile that holds ``rows`` packed rows."""
    heights, classes = (np.array(column, np.int32) for column in zip(*tiles, strict=True))
    return classes[np.minimum(np.searchsorted(heights, rows), len(classes) - 1)]


def _starts(counts: npt.NDArray[np.integer]) -> Ints:
    """Exclusive sums with the total last: [2, 1] -> [0, 2, 3]."""
    starts = np.zeros(len(counts) + 1, np.int32)
    np.cumsum(counts, out=starts[1:])
    return starts


def _ranges(first: Ints, counts: Ints) -> Ints:
    """first[0] .. first[0] + counts[0] - 1, first[1] .., in one line."""
    starts = _starts(counts)
    return (np.arange(starts[-1], dtype=np.int32) + np.repeat(first - starts[:-1], counts)).astype(np.int32)


def _check(what: str, have: int, most: int) -> None:
    if have > most:
        raise WorkTooLarge(f"{what}: the step has {have}, the buffers hold {most}")
