"""A plan as index tensors: what the torch backend prepares once a step and uses in every layer."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor

from engine.model.rotary import Rotation
from engine.plan import ChunkRead, Tail, Window

SHORTEST_TAIL_TOKENS = 32  # a decode tail is padded to this times a power of two, by its own length only
ALIGNED_MAX = 512  # tokens

Tables = dict[int, tuple[Tensor, Tensor]]  # id of a Rotation -> cos, sin, fp32 (pairs, 1, frequencies)


@dataclass(frozen=True)
class Read:
    """A chunk read. ``rows`` None: every row of the step once, in order, all of them yielding the result ``place``.

    Otherwise ``rows`` and ``places`` are (pairs,), and ``padded_rows`` repeats the last row up to the multiple.
    ``mask`` (1, 1, pairs padded, tokens) hides the first tokens from rows that do not see them; None if all do.
    """

    first_slot: int
    tokens: int
    rows: Tensor | None
    places: Tensor | None
    padded_rows: Tensor | None
    place: int
    offsets: Tensor | None  # (pairs padded,); None if all are 0
    tables: Tables  # empty: nothing is turned
    mask: Tensor | None = None
    views: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)  # of the pool, by layer


@dataclass(frozen=True)
class TailClass:
    """Tails of one new row each, padded to one length: slots (tails * length,), mask (tails, 1, 1, length)."""

    rows: Tensor | None  # (tails,); None: every row of the step in order
    slots: Tensor
    mask: Tensor


@dataclass(frozen=True)
class LongTail:
    """The tail of a sequence with several new rows, from the first token on that one of them sees.

    ``slots`` (tokens,), or None: a run from ``first_slot``. ``tokens_before`` of them were there before the step, and
    the first ``seers`` rows see some of these, as ``mask`` (1, 1, seers, tokens_before) says; None: all see all.
    ``own_mask`` (1, 1, rows, rows) is what a window and causality hide of the new ones; None: causality alone.
    """

    first_row: int
    rows: int
    tokens_before: int
    first_slot: int
    slots: Tensor | None
    seers: int
    mask: Tensor | None = None
    own_mask: Tensor | None = None


@dataclass(frozen=True)
class SeenStep:
    """What the rows of a step see in the layers that have one window.

    ``aligned``: each partial result is one tensor over all rows, nothing needs scattering. ``partials`` is the number
    of partial results of a row besides its tail's.
    """

    partials: int
    reads: tuple[Read, ...]
    tail_classes: tuple[TailClass, ...]
    long_tails: tuple[LongTail, ...]
    aligned: bool


@dataclass(frozen=True)
class TorchStep:
    """A prepared step, for each window that layers have.

    ``own`` turns the step's rows to their own positions where the model's rotation is deferred, else empty.
    """

    rows: int
    slots: Tensor
    own: Tables
    through: dict[Window | None, SeenStep]


def alignment(window: Window | None) -> int:
    """Tokens from a chunk's or tail's start, to a multiple of which reading begins for a row that a window hides the
    beginning from; so rows that stand near each other read together, and what a row sums follows from itself alone.

    The blocks of chunked attention begin where they do.
    """
    if window is None or window.chunked:
        return 1
    return min(ALIGNED_MAX, max(SHORTEST_TAIL_TOKENS, 1 << max(window.tokens // 4, 1).bit_length() - 1))


def prepare_reads(
    read: ChunkRead,
    rows: int,
    row_multiple: int,
    align: int,
    rotations: Sequence[Rotation],
    dtype: torch.dtype,
    device: torch.device,
) -> list[Read]:
    """Index tensors and rotation tables of one read in a step of ``rows`` rows, for rows that see all of it and, with
    masks of ``dtype``, those from whom a window hides its beginning."""
    if not read.firsts:
        return [_prepare_read(read, rows, row_multiple, rotations, device)]
    groups: dict[tuple[int, bool], list[int]] = defaultdict(list)
    for index, first in enumerate(read.firsts):
        groups[first // align * align, first > 0].append(index)
    return [
        _prepare_read(_part(read, members, cut), rows, row_multiple, rotations, device, dtype if align > 1 else None)
        for (cut, _), members in groups.items()
    ]


def _part(read: ChunkRead, members: list[int], cut: int) -> ChunkRead:
    """The pairs ``members`` of a read, over the chunk's tokens from ``cut`` on."""
    some = [
        tuple([values[i] for i in members])
        for values in (read.rows, read.offsets, read.places, read.starts, read.firsts)
    ]
    rows, offsets, places, starts, firsts = some
    own = tuple([first - cut for first in firsts]) if firsts[0] else ()
    return ChunkRead(read.first_slot + cut, read.tokens - cut, rows, offsets, places, starts, own)


def _prepare_read(
    read: ChunkRead,
    rows: int,
    row_multiple: int,
    rotations: Sequence[Rotation],
    device: torch.device,
    masked: torch.dtype | None = None,
) -> Read:
    whole = read.rows == tuple(range(rows)) and len(set(read.places)) == 1
    padding = -len(read.rows) % row_multiple
    padded = read.rows + (read.rows[-1],) * padding
    tables: Tables = {}
    offsets = torch.tensor(read.offsets + (read.offsets[-1],) * padding) if any(read.offsets) else None
    if offsets is not None:
        tables = {id(rotation): rotation.table(offsets, device) for rotation in rotations}
    mask = None
    if read.firsts and masked is not None:
        mask = hidden_before(read.firsts + (read.firsts[-1],) * padding, read.tokens, masked, device)
    if whole and not padding:
        return Read(read.first_slot, read.tokens, None, None, None, read.places[0], offsets, tables, mask)
    return Read(
        read.first_slot,
        read.tokens,
        torch.tensor(read.rows, device=device),
        torch.tensor(read.places, device=device),
        torch.tensor(padded, device=device),
        read.places[0],
        offsets,
        tables,
        mask,
    )


def hidden_before(firsts: Sequence[int], tokens: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """A mask (1, 1, rows, tokens) that hides the tokens before ``firsts[row]``."""
    hidden = torch.arange(tokens, device=device) < torch.tensor(firsts, device=device)[:, None]
    return torch.zeros(hidden.shape, dtype=dtype, device=device).masked_fill_(hidden, float("-inf"))[None, None]


def turn_to_positions(read: Read, positions: Tensor, rotations: Sequence[Rotation], device: torch.device) -> Read:
    """The read with tables that turn raw queries by position minus offset, at ``positions`` (rows,) of this step."""
    if read.offsets is None:
        return read
    at = positions if read.padded_rows is None else positions[read.padded_rows.cpu()]
    tables = {id(rotation): rotation.whole_table(read.offsets - at, device) for rotation in rotations}
    return replace(read, tables=tables)


def prepare_tail_classes(
    tails: Sequence[Tail], rows: int, page_size: int, align: int, dtype: torch.dtype, device: torch.device
) -> tuple[TailClass, ...]:
    """Groups one-row tails by padded length. Slots behind a tail's end point at its last page's; masked."""
    classes: dict[int, list[Tail]] = defaultdict(list)
    for tail in tails:
        seen = tail.tokens_before + 1 - _begin(tail, align)
        length = SHORTEST_TAIL_TOKENS
        while length < seen:
            length *= 2
        if tail.first and align > 1:  # of one window's tokens and a little more, however long it is
            length = min(length, -(-seen // align) * align)
        classes[length].append(tail)
    return tuple(
        _tail_class(members, length, rows, page_size, align, dtype, device) for length, members in classes.items()
    )


def _begin(tail: Tail, align: int) -> int:
    """The token of a tail from which on it is read."""
    return tail.first[0] // align * align if tail.first else 0


def _tail_class(
    tails: list[Tail], length: int, rows: int, page_size: int, align: int, dtype: torch.dtype, device: torch.device
) -> TailClass:
    # numpy: a handful of tiny operations a step, each of which costs torch several times as much.
    begins = np.array([_begin(tail, align) for tail in tails])
    pages_max = -(-length // page_size) + (1 if begins.any() else 0)
    table = np.array(
        [_some_pages(tail.pages, begin // page_size, pages_max) for tail, begin in zip(tails, begins, strict=True)]
    )
    slots = (table[:, :, None] * page_size + np.arange(page_size)).reshape(len(tails), -1)
    slots = np.take_along_axis(slots, (begins % page_size)[:, None] + np.arange(length), axis=1)
    lasts = np.array([tail.tokens_before for tail in tails]) - begins
    firsts = np.array([tail.first[0] if tail.first else 0 for tail in tails]) - begins
    at = np.arange(length)
    hidden = np.where((at > lasts[:, None]) | (at < firsts[:, None]), -np.inf, 0.0).astype(np.float32)
    mask = torch.from_numpy(hidden)[:, None, None].to(device, dtype)
    first_rows = tuple(tail.first_row for tail in tails)
    index = None if first_rows == tuple(range(rows)) else torch.tensor(first_rows, device=device)
    return TailClass(index, torch.from_numpy(np.ascontiguousarray(slots).reshape(-1)).to(device), mask)


def _some_pages(pages: tuple[int, ...], first: int, count: int) -> tuple[int, ...]:
    """``count`` pages from the ``first`` on, filled up with one that is read for nothing."""
    some = pages[first : first + count]
    return (*some, *(some[:1] * (count - len(some))))


def prepare_long_tail(
    tail: Tail, page_size: int, device: torch.device, align: int = 1, dtype: torch.dtype = torch.float32
) -> LongTail:
    """The slots of a tail with several new rows, as a run where its pages are neighbours in order."""
    firsts = tail.first or (0,) * tail.rows
    begin = min(firsts[0] // align * align, tail.tokens_before)
    tokens = tail.tokens_before + tail.rows - begin
    skipped = begin // page_size
    used = tail.pages[skipped : -(-(begin + tokens) // page_size)]
    at = begin - skipped * page_size
    first_slot = used[0] * page_size + at
    slots = None
    if used != tuple(range(used[0], used[0] + len(used))):
        pages = torch.tensor(used)
        slots = (pages[:, None] * page_size + torch.arange(page_size)).reshape(-1)[at : at + tokens].to(device)
    before = tail.tokens_before - begin
    if not tail.first:
        return LongTail(tail.first_row, tail.rows, before, first_slot, slots, tail.rows)
    seers = sum(first < tail.tokens_before for first in firsts)  # the first rows: later ones see later tokens
    past, own = ([max(first - start, 0) for first in firsts] for start in (begin, tail.tokens_before))
    mask = hidden_before(past[:seers], before, dtype, device) if any(past[:seers]) else None
    own_mask = hidden_before(own, tail.rows, dtype, device) if any(own) else None
    if own_mask is not None:
        own_mask += torch.full_like(own_mask[0, 0], float("-inf")).triu_(1)
    return LongTail(tail.first_row, tail.rows, before, first_slot, slots, seers, mask, own_mask)


def without_gaps(reads: Sequence[ChunkRead]) -> list[ChunkRead]:
    """The reads with places counted among those that occur: results that nobody has take no room. An absent result
    leaves a row's bits as they are."""
    counted = {place: at for at, place in enumerate(sorted({place for read in reads for place in read.places}))}
    if all(place == at for place, at in counted.items()):
        return list(reads)
    return [replace(read, places=tuple([counted[place] for place in read.places])) for read in reads]


def is_aligned(partials: int, reads: Sequence[Read]) -> bool:
    """Whether every one of the ``partials`` results is exactly one read over all rows."""
    return all(read.rows is None for read in reads) and len(reads) == partials
