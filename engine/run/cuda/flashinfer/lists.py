"""A plan as FlashInfer's requests: rows over keys, either all of them or causally. NumPy only; knows no device.

FlashInfer has no mask a row could have of its own but slow ones. What rows see of a chunk or a tail is therefore cut
into requests of two kinds, each row's results being merged behind:

    whole    every row sees every key                      keys   k k k k k
    causal   row i of n sees all but the last n - 1 - i    row 0  * * *
                                                           row 1  * * * *
                                                           row 2  * * * * *

    a chunk                       whole; where rows see it from some token on (``ChunkRead.firsts``), whole over the
                                  rest for rows with one such token, and for rows whose first tokens follow each other
                                  causal with rows and keys in reverse order: who sees most comes last
    a tail                        causal over its tokens
    a tail behind a window        blocks of as many rows as the window has tokens: causal over the block's own tokens,
                                  and over those before it causal in reverse
    a piece whose chunks stand    one causal request over its chunks and its tail
    where they were computed

Keys are named by page, or by slot (pages of one token) where they do not begin at pages.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, groupby

import numpy as np
import numpy.typing as npt

from engine.plan import CascadePlan, ChunkRead, Tail

Ints = npt.NDArray[np.int32]
Longs = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Request:
    """``rows`` of the step over keys: ``pages`` that hold ``tokens``, of which the last one may not be whole.

    ``offsets`` and ``places`` are the rows': how far each is turned back, and which of its partial results comes of it.
    """

    rows: Sequence[int]
    offsets: Sequence[int]
    places: Sequence[int]
    pages: Ints
    tokens: int


@dataclass(frozen=True)
class Requests:
    """The requests of a step; a page has ``unit`` tokens."""

    whole: tuple[Request, ...]
    causal: tuple[Request, ...]
    unit: int

    def batches(self, rows_max: int) -> list[Requests]:
        """The same in parts of at most ``rows_max`` query rows, or of one request."""
        parts: list[Requests] = []
        members: tuple[list[Request], list[Request]] = ([], [])
        rows = 0
        for kind, request in chain(((0, each) for each in self.whole), ((1, each) for each in self.causal)):
            if rows and rows + len(request.rows) > rows_max:
                parts.append(Requests(tuple(members[0]), tuple(members[1]), self.unit))
                members, rows = ([], []), 0
            members[kind].append(request)
            rows += len(request.rows)
        return [*parts, Requests(tuple(members[0]), tuple(members[1]), self.unit)]


def requests_of(plan: CascadePlan, page_size: int, *, by_slot: bool = False) -> Requests:
    """The requests of a plan. Keys are named by page of ``page_size`` tokens where every request begins at one, unless
    they have to be named ``by_slot``."""
    windowed = any(read.firsts for read in plan.reads) or any(tail.first for tail in plan.tails)
    still = len(plan.tails) == 1 and plan.tails[0].rows > 1 and not any(any(read.offsets) for read in plan.reads)
    if windowed or (by_slot and not still):
        cut = [each for read in plan.reads for each in _cut_read(read)]
        tails = [each for tail in plan.tails for each in _cut_tail(tail, plan.partials, page_size)]
        whole, causal = (tuple(r for is_causal, r in (*cut, *tails) if is_causal is kind) for kind in (False, True))
        return Requests(whole, causal, 1)
    if still and (plan.reads or by_slot):
        return Requests((), (_piece(plan, page_size),), 1)
    chunks = (
        Request(read.rows, read.offsets, read.places, _pages(read.first_slot, read.tokens, page_size), read.tokens)
        for read in plan.reads
    )
    own = (_tail(tail, plan.partials, page_size) for tail in plan.tails)
    return Requests(tuple(chunks), tuple(own), page_size)


def _pages(first_slot: int, tokens: int, page_size: int) -> Ints:
    return np.arange(first_slot // page_size, -(-(first_slot + tokens) // page_size), dtype=np.int32)


def _tail(tail: Tail, place: int, page_size: int) -> Request:
    tokens = tail.tokens_before + tail.rows
    rows = range(tail.first_row, tail.first_row + tail.rows)
    pages = np.asarray(tail.pages[: -(-tokens // page_size)], np.int32)
    return Request(rows, (0,) * tail.rows, (place,) * tail.rows, pages, tokens)


def _piece(plan: CascadePlan, page_size: int) -> Request:
    """One sequence's rows over all that it sees, chunk after chunk, then its tail."""
    (tail,) = plan.tails
    reads = sorted(plan.reads, key=lambda read: read.places[0])
    runs = [_pages(read.first_slot, read.tokens, 1) for read in reads]
    slots = np.concatenate((*runs, _slots(tail, page_size, 0, tail.tokens_before + tail.rows)))
    rows = range(tail.first_row, tail.first_row + tail.rows)
    return Request(rows, (0,) * tail.rows, (0,) * tail.rows, slots, len(slots))


def _slots(tail: Tail, page_size: int, begin: int, end: int) -> Ints:
    """Where tokens ``begin`` .. ``end - 1`` of a tail are."""
    first = begin // page_size
    pages = np.asarray(tail.pages[first : -(-end // page_size)], np.int32)
    at = np.arange(begin, end, dtype=np.int32)
    slots: Ints = pages[at // page_size - first] * page_size + at % page_size
    return slots


# -- windows ----------------------------------------------------------------------------------------
def _cut_read(read: ChunkRead) -> Iterator[tuple[bool, Request]]:
    """(causal, request) of a chunk that its rows see from ``firsts`` on."""
    firsts = read.firsts or (0,) * len(read.rows)
    pairs = sorted(range(len(read.rows)), key=lambda pair: (firsts[pair], pair))
    groups = [(first, list(same)) for first, same in groupby(pairs, key=lambda pair: firsts[pair])]

    def request(members: Iterable[int], slots: Ints) -> Request:
        chosen = list(members)
        rows, offsets, places = ([each[pair] for pair in chosen] for each in (read.rows, read.offsets, read.places))
        return Request(rows, offsets, places, slots, len(slots))

    end = read.first_slot + read.tokens
    for ramp in _ramps(groups):
        first = ramp[0][0]
        slots = np.arange(read.first_slot + first, end, dtype=np.int32)
        if len(ramp) == 1:
            yield False, request(ramp[0][1], slots)
        else:
            yield True, request((same[0] for _, same in reversed(ramp)), slots[::-1])


def _ramps(groups: list[tuple[int, list[int]]]) -> Iterator[list[tuple[int, list[int]]]]:
    """Runs of groups of one pair each whose first tokens follow each other; any other group by itself."""
    run: list[tuple[int, list[int]]] = []
    for first, same in groups:
        if run and not (len(same) == len(run[-1][1]) == 1 and first == run[-1][0] + 1):
            yield run
            run = []
        run.append((first, same))
    if run:
        yield run


def _cut_tail(tail: Tail, place: int, page_size: int) -> Iterator[tuple[bool, Request]]:
    """(causal, request) of a tail that its rows see from ``first`` on."""
    before = tail.tokens_before
    firsts = tail.first or (0,) * tail.rows

    def slots(begin: int, end: int) -> Ints:
        return _slots(tail, page_size, begin, end)

    def request(rows: Sequence[int], keys: Ints) -> tuple[bool, Request]:
        at = [tail.first_row + row for row in rows]
        return True, Request(at, (0,) * len(at), (place,) * len(at), keys, len(keys))

    row = 0
    while row < tail.rows:
        first, own = firsts[row], before + row  # ``own``: the row's own token
        end = row + 1
        if end < tail.rows and firsts[end] == first + 1:  # a window: a block of as many rows as it has tokens
            most = min(tail.rows, row + own - first + 1)
            while end < most and firsts[end] == firsts[end - 1] + 1:
                end += 1
            yield request(range(row, end), slots(own, before + end))
            if own > first:
                seeing = min(end, row + own - first)  # rows that see something before the block
                yield request(range(seeing - 1, row - 1, -1), slots(first, own)[::-1])
        else:
            while end < tail.rows and firsts[end] == first:
                end += 1
            yield request(range(row, end), slots(first, before + end))
        row = end


# -- arrays -----------------------------------------------------------------------------------------
@dataclass(frozen=True)
class CallLists:
    """Requests of one kind as FlashInfer is told of them: ragged rows over ragged pages, in a line each."""

    rows: Longs
    offsets: Longs
    places: Longs
    row_starts: Ints
    page_starts: Ints
    pages: Ints
    last_page_tokens: Ints
    rows_max: int

    @classmethod
    def of(cls, requests: Sequence[Request], unit: int) -> CallLists:
        rows, offsets, places = (
            np.fromiter(chain.from_iterable(column), np.int64)
            for column in zip(*((each.rows, each.offsets, each.places) for each in requests), strict=True)
        )
        counts = [len(each.rows) for each in requests]
        pages = [each.pages for each in requests]
        last = [(each.tokens - 1) % unit + 1 for each in requests]
        row_starts, page_starts = (np.cumsum([0, *n]).astype(np.int32) for n in (counts, map(len, pages)))
        ends = np.asarray(last, np.int32)
        return cls(rows, offsets, places, row_starts, page_starts, np.concatenate(pages), ends, max(counts))


def merge_order(rows: int, parts: Sequence[CallLists]) -> tuple[Ints, Ints]:
    """Where each row's results begin in ``order`` (rows + 1), and ``order``: where they lie, by place.

    Results lie in the order of the parts. Of one place those that were listed first come first.
    """
    owner, place = (
        np.concatenate([getattr(part, name) for part in parts]) if parts else np.zeros(0, np.int64)
        for name in ("rows", "places")
    )
    order = np.lexsort((np.arange(len(owner)), place, owner)).astype(np.int32)
    starts = np.zeros(rows + 1, np.int32)
    np.cumsum(np.bincount(owner, minlength=rows), out=starts[1:])
    return starts, order
