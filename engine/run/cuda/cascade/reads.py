"""Reads of a plan as arrays, and what a window leaves of them. NumPy only.

Rows move on with every step, so what a layer's window hides is worked out anew in each; compositions stay.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import chain

import numpy as np
import numpy.typing as npt

from engine.plan import Levels, Window

Ints = npt.NDArray[np.int32]


@dataclass(frozen=True)
class PairReads:
    """Reads one after the other, and their (chunk, row) pairs: ``count`` of each read, in its order.

    To its row a pair's chunk begins at position ``start``; the row sees its tokens from ``firsts`` on (None: all).
    """

    source: Ints  # of each read: first slot
    tokens: Ints
    count: Ints
    row: Ints  # of each pair
    offset: Ints
    place: Ints
    start: Ints
    firsts: Ints | None = None

    @classmethod
    def of(cls, levels: Levels) -> PairReads:
        """All that the rows of ``levels`` read."""
        reads = [read for level in levels for read in level]
        numbers = [(read.first_slot, read.tokens, len(read.rows)) for read in reads]
        source, tokens, count = np.ascontiguousarray(np.array(numbers, np.int32).reshape(-1, 3).T)
        total = int(count.sum())

        def line(values: Iterable[tuple[int, ...]]) -> Ints:
            return np.fromiter(chain.from_iterable(values), np.int32, total)

        return cls(
            source, tokens, count, line([read.rows for read in reads]), line([read.offsets for read in reads]),
            line([read.places for read in reads]), line([read.starts for read in reads]),
        )  # fmt: skip

    def hidden(self, seen: Ints) -> Ints:
        """How many of its chunk's tokens each pair does not see, whose row sees positions from ``seen[row]`` on."""
        hidden: Ints = np.clip(seen[self.row] - self.start, 0, np.repeat(self.tokens, self.count)).astype(np.int32)
        return hidden

    def without(self, hidden: Ints) -> PairReads:
        """What is left where so many tokens of each pair are hidden: pairs and reads that see nothing are gone."""
        kept = hidden < np.repeat(self.tokens, self.count)
        read = np.repeat(np.arange(len(self.count)), self.count)[kept]
        count = np.bincount(read, minlength=len(self.count)).astype(np.int32)
        reads = count > 0
        firsts = hidden[kept]
        return PairReads(
            self.source[reads], self.tokens[reads], count[reads], self.row[kept], self.offset[kept], self.place[kept],
            self.start[kept], firsts if firsts.any() else None,
        )  # fmt: skip


def first_seen(window: Window | None, positions: Ints) -> Ints | None:
    """The first position that each row sees, as ``Window.first``; None where every row sees everything."""
    if window is None:
        return None
    if window.chunked:
        seen = positions // window.tokens * window.tokens
    else:
        seen = np.maximum(positions - (window.tokens - 1), 0)
    return seen if seen.any() else None
