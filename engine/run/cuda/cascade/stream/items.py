"""Which items a program has, and what their records say. A warpgroup takes ``ROWS`` packed rows of each."""

# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call"
from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from engine.run.cuda.cascade import records

ITEM = gl.constexpr(records.ITEM)
PAIR = gl.constexpr(records.PAIR)
AT_COUNTS = gl.constexpr(records.AT_COUNTS)
AT_ITEMS = gl.constexpr(records.AT_ITEMS)
ROWS = gl.constexpr(64)  # packed rows of a warpgroup


@gluon.jit
def items_of(lists, dynamic, class_index):
    """How many items are static, how many there are, and where the static and the dynamic ones begin."""
    static_items = gl.load(lists + AT_COUNTS + class_index)
    items = static_items + gl.load(lists + dynamic + AT_COUNTS + class_index)
    static_at = gl.load(lists + AT_ITEMS + class_index)
    return static_items, items, static_at, gl.load(lists + dynamic + AT_ITEMS + class_index)


@gluon.jit
def item_at(number, lists, static_items, static_at, dynamic_at):
    """The item of that number: the static ones first."""
    at = gl.where(number < static_items, static_at + number * ITEM, dynamic_at + (number - static_items) * ITEM)
    return lists + at


@gluon.jit
def units_of(total):
    """How many (item, head) units this program has: every num_programs-th."""
    return gl.maximum((total - gl.program_id(0) + gl.num_programs(0) - 1) // gl.num_programs(0), 0)


@gluon.jit
def unit_at(number, units, BACKWARDS: gl.constexpr):
    """This program's unit of that number. The second half of the programs goes backwards, tails first."""
    if BACKWARDS:
        number = gl.where(gl.program_id(0) * 2 >= gl.num_programs(0), units - 1 - number, number)
    return gl.program_id(0) + number * gl.num_programs(0)


@gluon.jit
def grid_of(begin, N: gl.constexpr, WINDOW: gl.constexpr):
    """Where the first block of an item begins: splits are multiples of N."""
    if WINDOW:
        return begin // N * N
    return begin


@gluon.jit
def fields_of(item, known, GROUP: gl.constexpr, WINDOW: gl.constexpr):
    """An item's fields as a warpgroup needs them; no rows if there is no such item."""
    pairs_at = gl.load(item, mask=known, other=0)
    row0 = gl.load(item + 1, mask=known, other=0) + GROUP * ROWS
    rows_end = gl.load(item + 2, mask=known, other=0)
    begin = gl.load(item + 4, mask=known, other=0)
    full_end = gl.load(item + 5, mask=known, other=0)
    end = gl.load(item + 6, mask=known, other=0)
    full_begin = begin
    if WINDOW:
        full_begin = gl.load(item + 8, mask=known, other=0)
    return pairs_at, row0, rows_end, begin, full_end, end, gl.load(item + 7, mask=known, other=0), full_begin
