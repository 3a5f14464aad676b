"""The dynamic lists of a step: its rows, their tails, and the pages of these."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import chain

import numpy as np

from engine.plan import CascadePlan
from engine.run.cuda.cascade.items import Groups, items_of
from engine.run.cuda.cascade.ranges import ranges_of, starts_of
from engine.run.cuda.cascade.reads import Ints
from engine.run.cuda.cascade.records import AT_PAGES, AT_POSITIONS, HEADER, PAIR, ROW, ListShape, check
from engine.run.cuda.cascade.shared import SharedLists


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
    owned = first if len(tails) == rows else ranges_of(first, count)
    visible = (
        before + 1 if len(tails) == rows else np.repeat(before, count) + ranges_of(np.zeros_like(count), count) + 1
    )
    positions = np.array(plan.positions, np.int32)
    firsts = None
    if seen is not None:
        firsts = np.zeros(rows, np.int32)
        firsts[owned] = np.maximum(seen[owned] - np.repeat(positions[first] - before, count), 0)
    splits_of_row = np.zeros(rows, np.int32)
    splits_of_row[owned] = -(-visible // size)
    if firsts is not None:
        splits_of_row -= firsts // size
    row_first = starts_of(splits_of_row)
    pages = _pages_of(plan, None if firsts is None else firsts[first], page_size)
    check("rows", rows, shape.limits.rows)
    check("pages", len(pages.pages), shape.limits.pages)
    check("partials", int(row_first[-1]), shape.limits.partials)
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
    groups = Groups(first * PAIR, count, source, before + count, split, before + 1, 1, firsts)
    header, items = items_of(groups, shape, at=at)
    header[0] = rows
    header[AT_POSITIONS] = at + len(items) + rows * PAIR
    header[AT_PAGES] = header[AT_POSITIONS] + rows - pages.ahead
    return np.concatenate((header, records.reshape(-1), items, pairs.reshape(-1), positions, pages.pages))


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
    begins = starts_of(np.fromiter(map(len, seen), np.int32, len(seen)))
    pages = np.fromiter(chain.from_iterable(seen), np.int32, int(begins[-1]))
    page_0 = begins[:-1] - skipped
    ahead = max(0, -int(page_0.min(initial=0)))
    return _Pages(pages, begins, skipped, page_0 + ahead, ahead)
