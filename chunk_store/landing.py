"""Memory that the data of an entry is read into, piece by piece, and what is done with a piece once it is verified.

    data      |------ plane 0 ------|------ plane 1 ------|- plane 2 -| ...
    pieces    |---- 0 ----|---- 1 ----|---- 2 ----|---- 3 ----|         some blocks each, in any order, several at once

A reader takes a piece, fills it, checks it and gives it back; whoever gave it may then move it on (to a device) while
others are read.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from itertools import accumulate
from typing import Protocol

PIECE_NBYTES = 2 * 2**20  # what was read is then still in a cache when it is checked


class Landing(Protocol):
    """Where one entry's data goes. Thread-safe: readers take one piece at a time each."""

    @property
    def sizes(self) -> Sequence[int]:
        """Bytes of each plane."""

    @property
    def piece_nbytes(self) -> int:
        """How much a reader should take at once; it may take more where one block is larger."""

    def piece(self, start: int, nbytes: int) -> AbstractContextManager[Sequence[memoryview]]:
        """Memory for bytes ``start .. start + nbytes`` of the data: flat writable views, cut at planes' edges at most.

        Leaving the block says that all of them are there and right; leaving it by an exception, that they are not.
        A range may come a second time: the last one counts.
        """


class Buffers:
    """The ``Landing`` of a caller's own memory, one flat buffer a plane."""

    piece_nbytes = PIECE_NBYTES

    def __init__(self, views: Sequence[memoryview]) -> None:
        self.sizes = tuple(view.nbytes for view in views)
        self._views = views
        self._starts = list(accumulate(self.sizes, initial=0))

    @contextmanager
    def piece(self, start: int, nbytes: int) -> Iterator[Sequence[memoryview]]:
        first, last = bisect_left(self._starts, start), bisect_left(self._starts, start + nbytes)
        if self._starts[first] == start and self._starts[last] == start + nbytes:
            yield self._views[first:last]
            return
        yield [self._views[plane][first:last] for plane, first, last in ranges(self._starts, start, nbytes)]


def ranges(starts: Sequence[int], start: int, nbytes: int) -> Iterator[tuple[int, int, int]]:
    """What bytes ``start .. start + nbytes`` of the data are of each plane: its number, first and last byte.

    ``starts`` is where each plane begins in the data, and where the last one ends.
    """
    plane = bisect_right(starts, start) - 1
    end = start + nbytes
    while start < end:
        last = min(end, starts[plane + 1])
        if last > start:
            yield plane, start - starts[plane], last - starts[plane]
        start, plane = last, plane + 1


def cut(views: Sequence[memoryview], sizes: Sequence[int]) -> Iterator[memoryview]:
    """``views`` in pieces of ``sizes`` bytes, none of which spans two views."""
    if [view.nbytes for view in views] == sizes:
        yield from views
        return
    left = iter(views)
    view, at = memoryview(b""), 0
    for size in sizes:
        while at == view.nbytes:
            view, at = next(left), 0
        yield view if size == view.nbytes else view[at : at + size]
        at += size
