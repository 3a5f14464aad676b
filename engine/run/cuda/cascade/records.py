"""Work lists of the cascade kernels: a plan as int32 records, and what bounds them. NumPy only; knows no device.

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

    static  [header | items by tile class | pairs]                              while compositions last (``shared``)
    dynamic [header | rows | items by tile class | pairs (the rows) | positions | pages]                   (``tails``)

    header  0: rows   1 + c: items of class c   9 + c: where they begin   17, 18: where positions and page 0 are
    rows    of each row: its first shared partial, how many, its tail's first partial, how many
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from engine.run.cuda.cascade.reads import Ints

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


def check(what: str, have: int, most: int) -> None:
    if have > most:
        raise WorkTooLarge(f"{what}: the step has {have}, the buffers hold {most}")
