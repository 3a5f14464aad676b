"""A plan as index tensors: what the torch backend prepares once a step and uses in every layer."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor

from engine.model.rotary import Rotation
from engine.plan import CascadePlan, ChunkRead, Tail

SHORTEST_TAIL_TOKENS = 32  # a decode tail is padded to this times a power of two, by its own length only

Tables = dict[int, tuple[Tensor, Tensor]]  # id of a Rotation -> cos, sin, fp32 (pairs, 1, frequencies)


@dataclass(frozen=True)
class Read:
    """A chunk read. ``rows`` None: every row of the step once, in order, all of them yielding the result ``place``.

    Otherwise ``rows`` and ``places`` are (pairs,), and ``padded_rows`` repeats the last row up to the multiple.
    """

    first_slot: int
    tokens: int
    rows: Tensor | None
    places: Tensor | None
    padded_rows: Tensor | None
    place: int
    offsets: Tensor | None  # (pairs padded,); None if all are 0
    tables: Tables  # empty: nothing is turned
    views: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)  # of the pool, by layer


@dataclass(frozen=True)
class TailClass:
    """Tails of one new row each, padded to one length: slots (tails * length,), mask (tails, 1, 1, length)."""

    rows: Tensor | None  # (tails,); None: every row of the step in order
    slots: Tensor
    mask: Tensor


@dataclass(frozen=True)
class LongTail:
    """The tail of a sequence with several new rows. ``slots`` (tokens,), or None: a run from ``first_slot``."""

    first_row: int
    rows: int
    tokens_before: int
    first_slot: int
    slots: Tensor | None


@dataclass(frozen=True)
class TorchStep:
    """A prepared step. ``aligned``: each partial result is one tensor over all rows, nothing needs scattering.

    ``own`` turns the step's rows to their own positions where the model's rotation is deferred, else empty.
    """

    rows: int
    partials: int
    slots: Tensor
    reads: tuple[Read, ...]
    tail_classes: tuple[TailClass, ...]
    long_tails: tuple[LongTail, ...]
    aligned: bool
    own: Tables


def prepare_read(
    read: ChunkRead, rows: int, row_multiple: int, rotations: Sequence[Rotation], device: torch.device
) -> Read:
    """Index tensors and rotation tables of one read in a step of ``rows`` rows."""
    whole = read.rows == tuple(range(rows)) and len(set(read.places)) == 1
    padding = -len(read.rows) % row_multiple
    padded = read.rows + (read.rows[-1],) * padding
    tables: Tables = {}
    offsets = torch.tensor(read.offsets + (read.offsets[-1],) * padding) if any(read.offsets) else None
    if offsets is not None:
        tables = {id(rotation): rotation.table(offsets, device) for rotation in rotations}
    if whole and not padding:
        return Read(read.first_slot, read.tokens, None, None, None, read.places[0], offsets, tables)
    return Read(
        read.first_slot,
        read.tokens,
        torch.tensor(read.rows, device=device),
        torch.tensor(read.places, device=device),
        torch.tensor(padded, device=device),
        read.places[0],
        offsets,
        tables,
    )


def turn_to_positions(read: Read, positions: Tensor, rotations: Sequence[Rotation], device: torch.device) -> Read:
    """The read with tables that turn raw queries by position minus offset, at ``positions`` (rows,) of this step."""
    if read.offsets is None:
        return read
    at = positions if read.padded_rows is None else positions[read.padded_rows.cpu()]
    tables = {id(rotation): rotation.whole_table(read.offsets - at, device) for rotation in rotations}
    return replace(read, tables=tables)


def prepare_tail_classes(
    tails: Sequence[Tail], rows: int, page_size: int, dtype: torch.dtype, device: torch.device
) -> tuple[TailClass, ...]:
    """Groups one-row tails by padded length. Slots behind a tail's end point at its last page's; masked."""
    classes: dict[int, list[Tail]] = defaultdict(list)
    for tail in tails:
        length = SHORTEST_TAIL_TOKENS
        while length < tail.tokens_before + 1:
            length *= 2
        classes[length].append(tail)
    return tuple(_tail_class(members, length, rows, page_size, dtype, device) for length, members in classes.items())


def _tail_class(
    tails: list[Tail], length: int, rows: int, page_size: int, dtype: torch.dtype, device: torch.device
) -> TailClass:
    pages_max = -(-length // page_size)
    # numpy: a handful of tiny operations a step, each of which costs torch several times as much.
    table = np.array([[*t.pages[:pages_max], *(t.pages[:1] * (pages_max - len(t.pages)))] for t in tails])
    slots = (table[:, :, None] * page_size + np.arange(page_size)).reshape(len(tails), -1)[:, :length]
    lengths = np.array([tail.tokens_before + 1 for tail in tails])
    hidden = np.where(np.arange(length) >= lengths[:, None], -np.inf, 0.0).astype(np.float32)
    mask = torch.from_numpy(hidden)[:, None, None].to(device, dtype)
    first_rows = tuple(tail.first_row for tail in tails)
    index = None if first_rows == tuple(range(rows)) else torch.tensor(first_rows, device=device)
    return TailClass(index, torch.from_numpy(np.ascontiguousarray(slots).reshape(-1)).to(device), mask)


def prepare_long_tail(tail: Tail, page_size: int, device: torch.device) -> LongTail:
    """The slots of a tail with several new rows, as a run where its pages are neighbours in order."""
    tokens = tail.tokens_before + tail.rows
    used = tail.pages[: -(-tokens // page_size)]
    first_slot = used[0] * page_size
    if used == tuple(range(used[0], used[0] + len(used))):
        return LongTail(tail.first_row, tail.rows, tail.tokens_before, first_slot, None)
    pages = torch.tensor(used)
    slots = (pages[:, None] * page_size + torch.arange(page_size)).reshape(-1)[:tokens]
    return LongTail(tail.first_row, tail.rows, tail.tokens_before, first_slot, slots.to(device))


def is_aligned(plan: CascadePlan, reads: Sequence[Read]) -> bool:
    """Whether every partial result of the plan is exactly one read over all rows."""
    return all(read.rows is None for read in reads) and len(reads) == plan.partials - 1
