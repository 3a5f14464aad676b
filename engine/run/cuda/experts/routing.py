# mypy: ignore-errors
"""Which experts a row goes to, with what shares, and the order of (row, expert) pairs by expert.

    scores   rows x router, in parts of the hidden width, fp32
    select   parts -> logits -> softmax -> the ``TOP`` experts of each row and their shares, a block of rows a program
    place    of several blocks: where each pair stands among all, sorted by expert, then by row
    sum_up   of many blocks: how many rows of those before went to each expert, and of all, for ``place_summed``

A row has ``TOP`` pairs, ``row * TOP + slot`` with slots in ascending order of its experts. Nothing is said to the host.

What a row gets depends on that row alone: its scores are summed along the width in one order, sums over experts are of
integers (fixed point), which no order changes, and equal scores go to the expert of the lowest number. Importing this
needs Triton. ``OVERLAP``: see ``engine.run.cuda.kernels``.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

FIXED = tl.constexpr(float(1 << 40))  # parts of 1 that sums of at most 1 each are counted in
UNFIXED = tl.constexpr(1.0 / (1 << 40))
NONE = tl.constexpr(-(1 << 31))  # below every key


@triton.jit(do_not_specialize=["rows"])
def scores(
    x, router, parts, rows,
    WIDTH: tl.constexpr, SPAN: tl.constexpr, EXPERTS: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_R: tl.constexpr,
    BLOCK_K: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """Programs (rows, part): parts[part, row] (BLOCK_E,) = router[:, its SPAN of the width] @ x[row, the same].

    x (rows, WIDTH), router (EXPERTS, WIDTH), parts (parts, rows, BLOCK_E) fp32.
    """
    if OVERLAP:
        gdc_launch_dependents()
        gdc_wait()
    row = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    expert = tl.arange(0, BLOCK_E)
    first = tl.program_id(1) * SPAN
    live = row < rows
    at_x = x + row.to(tl.int64)[:, None] * WIDTH
    at_w = router + expert[:, None] * WIDTH
    total = tl.zeros((BLOCK_E, BLOCK_R), tl.float32)
    for k in range(0, SPAN, BLOCK_K):
        dim = first + k + tl.arange(0, BLOCK_K)
        inside = dim < WIDTH
        w = tl.load(at_w + dim[None, :], mask=(expert < EXPERTS)[:, None] & inside[None, :], other=0.0)
        a = tl.load(at_x + dim[None, :], mask=live[:, None] & inside[None, :], other=0.0)
        total = tl.dot(w, tl.trans(a), total)
    into = parts + (tl.program_id(1).to(tl.int64) * rows + row)[None, :] * BLOCK_E + expert[:, None]
    tl.store(into, total, mask=live[None, :])


@triton.jit(do_not_specialize=["rows"])
def select(
    parts, like, shares, experts, starts, order, marks, counts, rows,
    PARTS: tl.constexpr, EXPERTS: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_R: tl.constexpr, TOP: tl.constexpr,
    NORMED: tl.constexpr, ROUNDED: tl.constexpr, ALONE: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """Programs (block of BLOCK_R rows,). ``like`` has the model's dtype, of 16 bits, to which logits are rounded.

    shares fp32 and experts int32 (rows * TOP). ALONE: there is one block, and ``starts`` (EXPERTS + 1) and ``order``
    (rows * TOP: pairs by place) are written at once. Otherwise marks (rows, BLOCK_E), which are slot * BLOCK_R + rank
    within the block, or -1, and counts (blocks, BLOCK_E).
    """
    if OVERLAP:
        gdc_launch_dependents()
        gdc_wait()
    row = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    expert = tl.arange(0, BLOCK_E)
    live = (row < rows)[:, None] & (expert < EXPERTS)[None, :]
    at = parts + row.to(tl.int64)[:, None] * BLOCK_E + expert[None, :]
    total = tl.load(at, mask=live, other=0.0)
    for part in tl.static_range(1, PARTS):
        total += tl.load(at + part * rows.to(tl.int64) * BLOCK_E, mask=live, other=0.0)
    rounded = total.to(like.dtype.element_ty)

    # 16 bits that are ordered as the logits are, above the expert's number backwards: all keys of a row differ.
    bits = rounded.to(tl.int16, bitcast=True).to(tl.int32)
    ordered = tl.where(bits < 0, bits ^ 0x7FFF, bits)
    key = tl.where(live, ordered * 65536 + (65535 - expert)[None, :], NONE)
    chosen = tl.zeros((BLOCK_R, BLOCK_E), tl.int32)
    for _ in tl.static_range(TOP):
        hit = key == tl.max(key, 1)[:, None]
        chosen = tl.where(hit & live, 1, chosen)
        key = tl.where(hit, NONE, key)

    wide = tl.where(live, rounded.to(tl.float32), float("-inf"))
    top = tl.where(row < rows, tl.max(wide, 1), 0.0)
    share = tl.exp(wide - top[:, None])
    whole = tl.sum((share * FIXED).to(tl.int64), 1).to(tl.float32) * UNFIXED
    share = share / tl.where(row < rows, whole, 1.0)[:, None]
    if NORMED:
        kept = tl.sum((tl.where(chosen > 0, share, 0.0) * FIXED).to(tl.int64), 1).to(tl.float32) * UNFIXED
        share = share / tl.where(row < rows, kept, 1.0)[:, None]
    if ROUNDED:
        share = share.to(rounded.dtype).to(tl.float32)

    slot = tl.cumsum(chosen, 1) - chosen
    rank = tl.cumsum(chosen, 0) - chosen
    count = tl.sum(chosen, 0)
    pair = row[:, None] * TOP + slot
    tl.store(shares + pair, share, mask=chosen > 0)
    tl.store(experts + pair, tl.broadcast_to(expert[None, :], (BLOCK_R, BLOCK_E)), mask=chosen > 0)
    if ALONE:
        end = tl.cumsum(count, 0)
        tl.store(starts + expert, end - count, mask=expert < EXPERTS)
        tl.store(starts + EXPERTS, rows * TOP)
        tl.store(order + (end - count)[None, :] + rank, pair, mask=chosen > 0)
    else:
        into = marks + row.to(tl.int64)[:, None] * BLOCK_E + expert[None, :]
        tl.store(into, tl.where(chosen > 0, slot * BLOCK_R + rank, -1), mask=(row < rows)[:, None])
        tl.store(counts + tl.program_id(0) * BLOCK_E + expert, count)


@triton.jit(do_not_specialize=["blocks"])
def sum_up(
    counts, totals, blocks,
    BLOCK_E: tl.constexpr, EXPERTS_AT_ONCE: tl.constexpr, AT_ONCE: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """Programs (EXPERTS_AT_ONCE experts,): counts (blocks, BLOCK_E) become those of all blocks before, and totals."""
    if OVERLAP:
        gdc_launch_dependents()
        gdc_wait()
    expert = tl.program_id(0) * EXPERTS_AT_ONCE + tl.arange(0, EXPERTS_AT_ONCE)
    total = tl.zeros((EXPERTS_AT_ONCE,), tl.int32)
    at = 0
    while at < blocks:
        block = at + tl.arange(0, AT_ONCE)
        here = counts + block[:, None] * BLOCK_E + expert[None, :]
        inside = (block < blocks)[:, None] & (expert >= 0)[None, :]
        found = tl.load(here, mask=inside, other=0)
        before = total[None, :] + tl.cumsum(found, 0) - found
        tl.debug_barrier()
        tl.store(here, before, mask=inside)
        total += tl.sum(found, 0)
        at += AT_ONCE
    tl.store(totals + expert, total)


@triton.jit
def _put(
    marks, starts, order, rows, total, before,
    EXPERTS: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_R: tl.constexpr, TOP: tl.constexpr,
):  # fmt: skip
    """Puts the pairs of this program's rows where they stand. (BLOCK_E,): ``total`` rows, and ``before`` this block."""
    mine = tl.program_id(0)
    row = mine * BLOCK_R + tl.arange(0, BLOCK_R)
    expert = tl.arange(0, BLOCK_E)
    inside = (row < rows)[:, None] & (expert >= 0)[None, :]
    mark = tl.load(marks + row.to(tl.int64)[:, None] * BLOCK_E + expert[None, :], mask=inside, other=-1)
    start = tl.cumsum(total, 0) - total
    if mine == 0:
        tl.store(starts + expert, start, mask=expert < EXPERTS)
        tl.store(starts + EXPERTS, rows * TOP)
    pair = row[:, None] * TOP + mark // BLOCK_R
    tl.store(order + (start + before)[None, :] + mark % BLOCK_R, pair, mask=mark >= 0)


@triton.jit(do_not_specialize=["rows"])
def place(
    marks, counts, starts, order, rows,
    EXPERTS: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_R: tl.constexpr, TOP: tl.constexpr, BLOCKS: tl.constexpr,
    OVERLAP: tl.constexpr,
):  # fmt: skip
    """Programs (block of BLOCK_R rows,), BLOCKS at most, as ``select`` has them."""
    if OVERLAP:
        gdc_launch_dependents()
        gdc_wait()
    block = tl.arange(0, BLOCKS)
    expert = tl.arange(0, BLOCK_E)
    inside = (block < tl.cdiv(rows, BLOCK_R))[:, None] & (expert >= 0)[None, :]
    found = tl.load(counts + block[:, None] * BLOCK_E + expert[None, :], mask=inside, other=0)
    before = tl.sum(tl.where((block < tl.program_id(0))[:, None], found, 0), 0)
    _put(marks, starts, order, rows, tl.sum(found, 0), before, EXPERTS, BLOCK_E, BLOCK_R, TOP)


@triton.jit(do_not_specialize=["rows"])
def place_summed(
    marks, counts, totals, starts, order, rows,
    EXPERTS: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_R: tl.constexpr, TOP: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """``place`` of any number of blocks, with counts and totals as ``sum_up`` leaves them."""
    if OVERLAP:
        gdc_launch_dependents()
        gdc_wait()
    expert = tl.arange(0, BLOCK_E)
    before = tl.load(counts + tl.program_id(0) * BLOCK_E + expert)
    _put(marks, starts, order, rows, tl.load(totals + expert), before, EXPERTS, BLOCK_E, BLOCK_R, TOP)
