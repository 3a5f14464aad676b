"""The cascade kernels in Triton: attention over a work list, then one ragged merge.

    attend   one tile of packed rows x one split of one chunk or tail x one KV head at a time; writes a
             normalised partial result and its base-2 log-sum-exp
    merge    each (row, head): all of its partials in the order of the composition, in fp32

Programs are persistent: how many items there are is read from device memory, so both replay in a CUDA graph
while the lists change. Lists are laid out in ``cascade_work``. Importing this module needs Triton.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call"
from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from engine.run.cuda.cascade import work

ITEM = tl.constexpr(work.ITEM)
PAIR = tl.constexpr(work.PAIR)
ROW = tl.constexpr(work.ROW)
HEADER = tl.constexpr(work.HEADER)
AT_COUNTS = tl.constexpr(work.AT_COUNTS)
AT_ITEMS = tl.constexpr(work.AT_ITEMS)
AT_POSITIONS = tl.constexpr(work.AT_POSITIONS)
AT_PAGES = tl.constexpr(work.AT_PAGES)

# ``OVERLAP``: programmatic dependent launch. A kernel lets the next one start at once, and waits, before it reads or
# writes anything that another kernel touches, until all of the one before is done.
AS_IS, FORWARD, BACK = 0, 1, 2  # how a query is turned: not; raw, by its position - offset; turned, back by the offset
NOT_TURNED = tl.constexpr(AS_IS)
TURNED_BACK = tl.constexpr(BACK)


@triton.jit
def load_query(
    q, q_stride, lists, dynamic, pairs_at, packed, live, head, cos, sin,
    TURN: tl.constexpr, RATIO: tl.constexpr, D: tl.constexpr, TURN_PAIRS: tl.constexpr,
):  # fmt: skip
    """A tile of queries (packed rows, D), each turned by its pair's angle in fp32 and rounded once."""
    pair = lists + pairs_at + (packed // RATIO) * PAIR
    row = tl.load(pair, mask=live, other=0)
    base = q + row.to(tl.int64) * q_stride + (head * RATIO + packed % RATIO) * D
    dim = tl.arange(0, D)
    x = tl.load(base[:, None] + dim[None, :], mask=live[:, None], other=0.0)
    if TURN == NOT_TURNED:
        return x
    angle = tl.load(pair + 1, mask=live, other=0)
    if TURN != TURNED_BACK:
        positions = lists + tl.load(lists + dynamic + AT_POSITIONS)
        angle = tl.load(positions + row, mask=live, other=0) - angle
    turns = dim < 2 * TURN_PAIRS
    first = dim < TURN_PAIRS
    partner = tl.where(turns, tl.where(first, dim + TURN_PAIRS, dim - TURN_PAIRS), dim)
    other = tl.load(base[:, None] + partner[None, :], mask=live[:, None], other=0.0).to(tl.float32)
    at = angle.to(tl.int64)[:, None] * TURN_PAIRS + (dim % TURN_PAIRS)[None, :]
    known = live[:, None] & turns[None, :]
    c = tl.load(cos + at, mask=known, other=1.0)
    s = tl.load(sin + at, mask=known, other=0.0)
    plus = first if TURN == TURNED_BACK else first == 0
    return (x.to(tl.float32) * c + tl.where(plus[None, :], other, -other) * s).to(x.dtype)


@triton.jit
def fold_in(scores, v, top, total, acc, scale):
    """Online softmax: one block of scores (rows, tokens) and values into the running maximum, sum and output."""
    new_top = tl.maximum(top, tl.max(scores, 1))
    safe = tl.where(new_top == float("-inf"), 0.0, new_top) * scale
    p = tl.exp2(scores * scale - safe[:, None])
    keep = tl.exp2(top * scale - safe)
    total = total * keep + tl.sum(p, 1)
    acc = tl.dot(p.to(v.dtype), v, acc * keep[:, None])
    return new_top, total, acc


@triton.jit(do_not_specialize=["class_index"])
def attend(
    q, q_stride, keys, values, key_blocks, value_blocks, slot_stride, lists, dynamic, class_index, cos, sin,
    partial_out, partial_lse, scale,
    TURN: tl.constexpr, RATIO: tl.constexpr, KV_HEADS: tl.constexpr, D: tl.constexpr, TURN_PAIRS: tl.constexpr,
    M: tl.constexpr, N: tl.constexpr, PAGE: tl.constexpr, TENSOR: tl.constexpr, SPLIT_LOOP: tl.constexpr,
    OVERLAP: tl.constexpr,
):  # fmt: skip
    """All items of one tile class, in steps of N tokens.

    ``SPLIT_LOOP``: blocks of a chunk that every row sees whole take a loop without masks. ``TENSOR``: that loop
    reads through ``key_blocks`` and ``value_blocks``, tensor descriptors of (slots, KV_HEADS * D) with blocks (N, D).
    """
    if OVERLAP:
        gdc_launch_dependents()
        gdc_wait()
    static_items = tl.load(lists + AT_COUNTS + class_index)
    items = static_items + tl.load(lists + dynamic + AT_COUNTS + class_index)
    static_at = tl.load(lists + AT_ITEMS + class_index)
    dynamic_at = tl.load(lists + dynamic + AT_ITEMS + class_index)
    pages_at = tl.load(lists + dynamic + AT_PAGES)
    dim = tl.arange(0, D)
    for index in range(tl.program_id(0), items * KV_HEADS, tl.num_programs(0)):
        number, head = index // KV_HEADS, index % KV_HEADS
        item = lists + tl.where(number < static_items, static_at + number * ITEM,
                                dynamic_at + (number - static_items) * ITEM)  # fmt: skip
        pairs_at = tl.load(item)
        packed = tl.load(item + 1) + tl.arange(0, M)
        live = packed < tl.load(item + 2)
        source = tl.load(item + 3)
        begin, full_end = tl.load(item + 4), tl.load(item + 5)
        end, split = tl.load(item + 6), tl.load(item + 7)
        masked_from = begin
        x = load_query(q, q_stride, lists, dynamic, pairs_at, packed, live, head, cos, sin, TURN, RATIO, D, TURN_PAIRS)
        top = tl.full([M], float("-inf"), tl.float32)
        total = tl.zeros([M], tl.float32)
        acc = tl.zeros([M, D], tl.float32)
        column = head * D
        if SPLIT_LOOP:
            whole = begin
            if source >= 0:
                whole = begin + (full_end - begin) // N * N
            for at in tl.range(begin, whole, N):
                if TENSOR:
                    k = key_blocks.load([source + at, column])
                    v = value_blocks.load([source + at, column])
                else:
                    slot = (source + at + tl.arange(0, N)).to(tl.int64) * slot_stride + column
                    k = tl.load(keys + slot[:, None] + dim[None, :])
                    v = tl.load(values + slot[:, None] + dim[None, :])
                top, total, acc = fold_in(tl.dot(x, k.T), v, top, total, acc, scale)
            masked_from = whole
        limit = tl.load(lists + pairs_at + (packed // RATIO) * PAIR + 2, mask=live, other=0)
        for at in tl.range(masked_from, end, N):
            token = at + tl.arange(0, N)
            inside = token < end
            page = tl.load(lists + pages_at + ~source + token // PAGE, mask=inside & (source < 0), other=0)
            slot = tl.where(source < 0, page * PAGE + token % PAGE, source + token).to(tl.int64) * slot_stride + column
            k = tl.load(keys + slot[:, None] + dim[None, :], mask=inside[:, None], other=0.0)
            v = tl.load(values + slot[:, None] + dim[None, :], mask=inside[:, None], other=0.0)
            scores = tl.where(token[None, :] < tl.minimum(limit, end)[:, None], tl.dot(x, k.T), float("-inf"))
            top, total, acc = fold_in(scores, v, top, total, acc, scale)
        seen = total > 0
        acc = acc / tl.where(seen, total, 1.0)[:, None]
        lse = tl.where(seen, top * scale + tl.log2(tl.where(seen, total, 1.0)), float("-inf"))
        partial = tl.load(lists + pairs_at + (packed // RATIO) * PAIR + 3, mask=live, other=0) + split
        live = live & (limit > begin)  # a row has partial results of the splits that it sees
        into = (partial * KV_HEADS + head) * RATIO + packed % RATIO
        tl.store(partial_lse + into, lse, mask=live)
        out = partial_out + into.to(tl.int64)[:, None] * D + dim[None, :]
        tl.store(out, acc.to(partial_out.dtype.element_ty), mask=live[:, None])


@triton.jit
def merge(
    partial_out, partial_lse, lists, dynamic, order, out, out_stride,
    HEADS: tl.constexpr, D: tl.constexpr, PARTS: tl.constexpr, ORDERED: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """Programs (row, head): the row's shared partials, then its tail's, PARTS at a time, always from the first on.

    ``ORDERED``: the row records count in ``order``, which says where each partial result lies.
    """
    if OVERLAP:
        gdc_launch_dependents()
    row = tl.program_id(0)
    head = tl.program_id(1)
    rows = tl.load(lists + dynamic)
    record = lists + dynamic + HEADER + row * ROW
    first = tl.load(record)
    shared_parts = tl.load(record + 1)
    tail_first = tl.load(record + 2)
    parts = shared_parts + tl.load(record + 3)
    dim = tl.arange(0, D)
    if OVERLAP:
        gdc_wait()
    if row >= rows:
        return
    top = float("-inf")
    total = 0.0
    acc = tl.zeros([D], tl.float32)
    for at in range(0, parts, PARTS):
        part = at + tl.arange(0, PARTS)
        known = part < parts
        from_ = tl.where(part < shared_parts, first + part, tail_first + part - shared_parts)
        if ORDERED:
            from_ = tl.load(order + from_, mask=known, other=0)
        from_ = from_ * HEADS + head
        lse = tl.load(partial_lse + from_, mask=known, other=float("-inf"))
        o = tl.load(partial_out + from_.to(tl.int64)[:, None] * D + dim[None, :], mask=known[:, None], other=0.0)
        new_top = tl.maximum(top, tl.max(lse, 0))
        safe = tl.where(new_top == float("-inf"), 0.0, new_top)
        weight = tl.exp2(lse - safe)
        keep = tl.exp2(top - safe)
        total = total * keep + tl.sum(weight, 0)
        acc = acc * keep + tl.sum(o.to(tl.float32) * weight[:, None], 0)
        top = new_top
    acc = acc / total
    at_row = out + row.to(tl.int64) * out_stride + head * D
    tl.store(at_row + dim, acc.to(out.dtype.element_ty))
