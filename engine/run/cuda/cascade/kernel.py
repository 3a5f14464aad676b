"""The cascade kernels in Triton: attention over a work list, then one ragged merge.

    attend   one tile of packed rows x one split of one chunk or tail x one KV head at a time; writes a
             normalised partial result and its base-2 log-sum-exp
    merge    each (row, head): all of its partials in the order of the composition, in fp32

Programs are persistent: how many items there are is read from device memory, so both replay in a CUDA graph
while the lists change. ``records`` says how lists are laid out. Importing this module needs Triton.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call"
from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from engine.run.cuda.cascade import records

ITEM = tl.constexpr(records.ITEM)
PAIR = tl.constexpr(records.PAIR)
ROW = tl.constexpr(records.ROW)
HEADER = tl.constexpr(records.HEADER)
AT_COUNTS = tl.constexpr(records.AT_COUNTS)
AT_ITEMS = tl.constexpr(records.AT_ITEMS)
AT_POSITIONS = tl.constexpr(records.AT_POSITIONS)
AT_PAGES = tl.constexpr(records.AT_PAGES)
LOG2_E = tl.constexpr(1.4426950408889634)

# ``OVERLAP``: programmatic dependent launch. A kernel lets the next one start at once, and waits, before it reads or
# writes anything that another kernel touches, until all of the one before is done.
AS_IS, FORWARD, BACK = 0, 1, 2  # how a query is turned: not; raw, by its position - offset; turned, back by the offset
NOT_TURNED = tl.constexpr(AS_IS)
TURNED_BACK = tl.constexpr(BACK)


@triton.jit
def turned_pairs(dim, FIRST: tl.constexpr, PAIRS: tl.constexpr, INTERLEAVED: tl.constexpr):
    """Of each dimension whether it turns, its pair, whether it is the pair's first, and the dimension of the other."""
    own = dim - FIRST
    turns = (own >= 0) & (own < 2 * PAIRS)
    if INTERLEAVED:
        return turns, own // 2, own % 2 == 0, tl.where(turns, FIRST + (own ^ 1), dim)
    first = own < PAIRS
    return turns, own % PAIRS, first, tl.where(turns, tl.where(first, dim + PAIRS, dim - PAIRS), dim)


@triton.jit
def load_query(
    q, q_stride, lists, dynamic, pairs_at, packed, live, head, cos, sin,
    TURN: tl.constexpr, RATIO: tl.constexpr, K_DIM: tl.constexpr, K_BLOCK: tl.constexpr, FIRST: tl.constexpr,
    TURN_PAIRS: tl.constexpr, INTERLEAVED: tl.constexpr,
):  # fmt: skip
    """A tile of queries (packed rows, K_BLOCK), each turned by its pair's angle in fp32 and rounded once."""
    pair = lists + pairs_at + (packed // RATIO) * PAIR
    row = tl.load(pair, mask=live, other=0)
    base = q + row.to(tl.int64) * q_stride + (head * RATIO + packed % RATIO) * K_DIM
    dim = tl.arange(0, K_BLOCK)
    inside = live[:, None]
    if K_BLOCK != K_DIM:
        inside = inside & (dim < K_DIM)[None, :]
    x = tl.load(base[:, None] + dim[None, :], mask=inside, other=0.0)
    if TURN == NOT_TURNED:
        return x
    angle = tl.load(pair + 1, mask=live, other=0)
    if TURN != TURNED_BACK:
        positions = lists + tl.load(lists + dynamic + AT_POSITIONS)
        angle = tl.load(positions + row, mask=live, other=0) - angle
    turns, number, first, partner = turned_pairs(dim, FIRST, TURN_PAIRS, INTERLEAVED)
    other = tl.load(base[:, None] + partner[None, :], mask=inside, other=0.0).to(tl.float32)
    at = angle.to(tl.int64)[:, None] * TURN_PAIRS + number[None, :]
    known = live[:, None] & turns[None, :]
    c = tl.load(cos + at, mask=known, other=1.0)
    s = tl.load(sin + at, mask=known, other=0.0)
    plus = first if TURN == TURNED_BACK else first == 0
    return (x.to(tl.float32) * c + tl.where(plus[None, :], other, -other) * s).to(x.dtype)


@triton.jit
def load_whole(pointers, dim, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """All rows, zeros from WIDTH on."""
    if BLOCK == WIDTH:
        return tl.load(pointers)
    return tl.load(pointers, mask=(dim < WIDTH)[None, :], other=0.0)


@triton.jit
def capped(scores, squeeze):
    """tanh(scores * squeeze / (2 log2 e)): what a soft cap is multiplied by."""
    return 1.0 - 2.0 / (tl.exp2(scores * squeeze) + 1.0)


@triton.jit
def fold_in(scores, v, top, total, acc, scale):
    """Online softmax: one block of scores (rows, tokens) and values into the running maximum, sum and output.

    A block of which a row sees nothing leaves its results as they are, to the bit: the factor of a maximum that stays
    is 1, where a fused multiplication would round it.
    """
    new_top = tl.maximum(top, tl.max(scores, 1))
    safe = tl.where(new_top == float("-inf"), 0.0, new_top) * scale
    p = tl.exp2(scores * scale - safe[:, None])
    keep = tl.where(new_top == top, 1.0, tl.exp2(top * scale - safe))
    total = total * keep + tl.sum(p, 1)
    acc = tl.dot(p.to(v.dtype), v, acc * keep[:, None])
    return new_top, total, acc


@triton.jit
def masked_block(
    x, keys, values, k_stride, v_stride, lists, pages_at, source, at, begin, end, seen_from, seen_to, head,
    top, total, acc, scale, squeeze,
    K_DIM: tl.constexpr, V_DIM: tl.constexpr, K_BLOCK: tl.constexpr, V_BLOCK: tl.constexpr, N: tl.constexpr,
    PAGE: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr,
):  # fmt: skip
    """N tokens from ``at`` on, of which each row sees those from ``seen_from`` to ``seen_to``; none else is read."""
    token = at + tl.arange(0, N)
    k_dim, v_dim = tl.arange(0, K_BLOCK), tl.arange(0, V_BLOCK)
    inside = token < end
    if WINDOW:
        inside = inside & (token >= begin)
    page = tl.load(lists + pages_at + ~source + token // PAGE, mask=inside & (source < 0), other=0)
    slot = tl.where(source < 0, page * PAGE + token % PAGE, source + token).to(tl.int64)
    k_inside, v_inside = inside[:, None], inside[:, None]
    if K_BLOCK != K_DIM:
        k_inside = k_inside & (k_dim < K_DIM)[None, :]
    if V_BLOCK != V_DIM:
        v_inside = v_inside & (v_dim < V_DIM)[None, :]
    k = tl.load(keys + (slot * k_stride + head * K_DIM)[:, None] + k_dim[None, :], mask=k_inside, other=0.0)
    v = tl.load(values + (slot * v_stride + head * V_DIM)[:, None] + v_dim[None, :], mask=v_inside, other=0.0)
    scores = tl.dot(x, k.T)
    if SOFTCAP:
        scores = capped(scores, squeeze)
    seen = token[None, :] < seen_to[:, None]
    if WINDOW:
        seen = seen & (token[None, :] >= seen_from[:, None])
    return fold_in(tl.where(seen, scores, float("-inf")), v, top, total, acc, scale)


@triton.jit
def whole_block(
    x, keys, values, key_blocks, value_blocks, k_stride, v_stride, slot, head, top, total, acc, scale, squeeze,
    K_DIM: tl.constexpr, V_DIM: tl.constexpr, K_BLOCK: tl.constexpr, V_BLOCK: tl.constexpr, N: tl.constexpr,
    TENSOR: tl.constexpr, SOFTCAP: tl.constexpr,
):  # fmt: skip
    """N tokens of a chunk from ``slot`` on, all of which every row sees."""
    if TENSOR:
        k = key_blocks.load([slot, head * K_DIM])
        v = value_blocks.load([slot, head * V_DIM])
    else:
        k_dim, v_dim = tl.arange(0, K_BLOCK), tl.arange(0, V_BLOCK)
        slots = (slot + tl.arange(0, N)).to(tl.int64)
        k = load_whole(keys + (slots * k_stride + head * K_DIM)[:, None] + k_dim[None, :], k_dim, K_DIM, K_BLOCK)
        v = load_whole(values + (slots * v_stride + head * V_DIM)[:, None] + v_dim[None, :], v_dim, V_DIM, V_BLOCK)
    scores = tl.dot(x, k.T)
    if SOFTCAP:
        scores = capped(scores, squeeze)
    return fold_in(scores, v, top, total, acc, scale)


@triton.jit
def attend_item(
    q, q_stride, keys, values, key_blocks, value_blocks, k_stride, v_stride, lists, dynamic, item, head, pages_at,
    cos, sin, partial_out, partial_lse, scale, squeeze,
    TURN: tl.constexpr, RATIO: tl.constexpr, KV_HEADS: tl.constexpr, K_DIM: tl.constexpr, V_DIM: tl.constexpr,
    K_BLOCK: tl.constexpr, V_BLOCK: tl.constexpr, FIRST: tl.constexpr, TURN_PAIRS: tl.constexpr,
    INTERLEAVED: tl.constexpr, M: tl.constexpr, N: tl.constexpr, PAGE: tl.constexpr, TENSOR: tl.constexpr,
    SPLIT_LOOP: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr,
):  # fmt: skip
    """One item for one head."""
    pairs_at = tl.load(item)
    packed = tl.load(item + 1) + tl.arange(0, M)
    live = packed < tl.load(item + 2)
    source = tl.load(item + 3)
    begin, full_end = tl.load(item + 4), tl.load(item + 5)
    end, split = tl.load(item + 6), tl.load(item + 7)
    x = load_query(q, q_stride, lists, dynamic, pairs_at, packed, live, head, cos, sin, TURN, RATIO, K_DIM, K_BLOCK,
                   FIRST, TURN_PAIRS, INTERLEAVED)  # fmt: skip
    pair = lists + pairs_at + (packed // RATIO) * PAIR
    limit = tl.load(pair + 2, mask=live, other=0)
    seen_from, seen_to = limit, tl.minimum(limit, end)
    top = tl.full([M], float("-inf"), tl.float32)
    total = tl.zeros([M], tl.float32)
    acc = tl.zeros([M, V_BLOCK], tl.float32)
    masked_from = begin
    if WINDOW:
        masked_from = begin // N * N  # splits are multiples of N
        seen_from = tl.load(pair + 4, mask=live, other=0)
    if SPLIT_LOOP:
        whole_from = begin
        if WINDOW:
            whole_from = (tl.load(item + 8) + N - 1) // N * N
            for at in tl.range(masked_from, whole_from, N):
                top, total, acc = masked_block(
                    x, keys, values, k_stride, v_stride, lists, pages_at, source, at, begin, end, seen_from, seen_to,
                    head, top, total, acc, scale, squeeze, K_DIM, V_DIM, K_BLOCK, V_BLOCK, N, PAGE, WINDOW, SOFTCAP,
                )  # fmt: skip
        whole_to = whole_from
        if source >= 0:
            whole_to = whole_from + tl.maximum(full_end - whole_from, 0) // N * N
        for at in tl.range(whole_from, whole_to, N):
            top, total, acc = whole_block(
                x, keys, values, key_blocks, value_blocks, k_stride, v_stride, source + at, head, top, total, acc,
                scale, squeeze, K_DIM, V_DIM, K_BLOCK, V_BLOCK, N, TENSOR, SOFTCAP,
            )  # fmt: skip
        masked_from = whole_to
    for at in tl.range(masked_from, end, N):
        top, total, acc = masked_block(
            x, keys, values, k_stride, v_stride, lists, pages_at, source, at, begin, end, seen_from, seen_to, head,
            top, total, acc, scale, squeeze, K_DIM, V_DIM, K_BLOCK, V_BLOCK, N, PAGE, WINDOW, SOFTCAP,
        )  # fmt: skip
    # Behind the mask that the pair's other fields are loaded by: Triton 3.6 does not compile one of another layout.
    partial = tl.load(pair + 3, mask=live, other=0) + split
    live = live & (limit > begin)  # a row has partial results of the splits that it sees
    if WINDOW:
        live = live & (seen_from < end)
    into = (partial * KV_HEADS + head) * RATIO + packed % RATIO
    store_partial(partial_out, partial_lse, into, live, top, total, acc, scale, V_DIM, V_BLOCK)


@triton.jit
def store_partial(partial_out, partial_lse, into, live, top, total, acc, scale, V_DIM: tl.constexpr,
                  V_BLOCK: tl.constexpr):  # fmt: skip
    """Normalised partial results of a tile's rows, at ``into``."""
    seen = total > 0
    acc = acc / tl.where(seen, total, 1.0)[:, None]
    lse = tl.where(seen, top * scale + tl.log2(tl.where(seen, total, 1.0)), float("-inf"))
    tl.store(partial_lse + into, lse, mask=live)
    dim = tl.arange(0, V_BLOCK)
    stored = live[:, None]
    if V_BLOCK != V_DIM:
        stored = stored & (dim < V_DIM)[None, :]
    out = partial_out + into.to(tl.int64)[:, None] * V_DIM + dim[None, :]
    tl.store(out, acc.to(partial_out.dtype.element_ty), mask=stored)


@triton.jit(do_not_specialize=["class_index"])
def attend(
    q, q_stride, keys, values, key_blocks, value_blocks, k_stride, v_stride, lists, dynamic, class_index, cos, sin,
    partial_out, partial_lse, scale, squeeze,
    TURN: tl.constexpr, RATIO: tl.constexpr, KV_HEADS: tl.constexpr, K_DIM: tl.constexpr, V_DIM: tl.constexpr,
    K_BLOCK: tl.constexpr, V_BLOCK: tl.constexpr, FIRST: tl.constexpr, TURN_PAIRS: tl.constexpr,
    INTERLEAVED: tl.constexpr, M: tl.constexpr, N: tl.constexpr, PAGE: tl.constexpr, TENSOR: tl.constexpr,
    SPLIT_LOOP: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """All items of one tile class, in steps of N tokens.

    Widths are padded to powers of two, K_BLOCK and V_BLOCK. ``SPLIT_LOOP``: blocks of a chunk that every row sees whole
    take a loop without masks. ``TENSOR``: that loop reads through ``key_blocks`` and ``value_blocks``, tensor
    descriptors of (slots, KV_HEADS * dim) with blocks (N, K_BLOCK or V_BLOCK). ``WINDOW``: rows do not see what comes
    before their first token; blocks lie where they lie without. ``SOFTCAP``: ``scale`` and ``squeeze`` are of the cap.
    """
    if OVERLAP:
        gdc_launch_dependents()
        gdc_wait()
    static_items = tl.load(lists + AT_COUNTS + class_index)
    items = static_items + tl.load(lists + dynamic + AT_COUNTS + class_index)
    static_at = tl.load(lists + AT_ITEMS + class_index)
    dynamic_at = tl.load(lists + dynamic + AT_ITEMS + class_index)
    pages_at = tl.load(lists + dynamic + AT_PAGES)
    for index in range(tl.program_id(0), items * KV_HEADS, tl.num_programs(0)):
        number, head = index // KV_HEADS, index % KV_HEADS
        item = lists + tl.where(number < static_items, static_at + number * ITEM,
                                dynamic_at + (number - static_items) * ITEM)  # fmt: skip
        attend_item(
            q, q_stride, keys, values, key_blocks, value_blocks, k_stride, v_stride, lists, dynamic, item, head,
            pages_at, cos, sin, partial_out, partial_lse, scale, squeeze, TURN, RATIO, KV_HEADS, K_DIM, V_DIM,
            K_BLOCK, V_BLOCK, FIRST, TURN_PAIRS, INTERLEAVED, M, N, PAGE, TENSOR, SPLIT_LOOP, WINDOW, SOFTCAP,
        )  # fmt: skip


@triton.jit
def merge(
    partial_out, partial_lse, lists, dynamic, out, out_stride, sinks,
    HEADS: tl.constexpr, V_DIM: tl.constexpr, V_BLOCK: tl.constexpr, PARTS: tl.constexpr, SINKS: tl.constexpr,
    OVERLAP: tl.constexpr,
):  # fmt: skip
    """Programs (row, head): the row's shared partials, then its tail's, PARTS at a time, always from the first on.

    ``SINKS``: ``sinks`` (HEADS,) fp32, natural scores of a key without a value, which every row sees last.
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
    dim = tl.arange(0, V_BLOCK)
    if OVERLAP:
        gdc_wait()
    if row >= rows:
        return
    top = float("-inf")
    total = 0.0
    acc = tl.zeros([V_BLOCK], tl.float32)
    for at in range(0, parts, PARTS):
        part = at + tl.arange(0, PARTS)
        known = part < parts
        from_ = tl.where(part < shared_parts, first + part, tail_first + part - shared_parts)
        from_ = from_ * HEADS + head
        lse = tl.load(partial_lse + from_, mask=known, other=float("-inf"))
        o_known = known[:, None]
        if V_BLOCK != V_DIM:
            o_known = o_known & (dim < V_DIM)[None, :]
        o = tl.load(partial_out + from_.to(tl.int64)[:, None] * V_DIM + dim[None, :], mask=o_known, other=0.0)
        new_top = tl.maximum(top, tl.max(lse, 0))
        safe = tl.where(new_top == float("-inf"), 0.0, new_top)
        weight = tl.exp2(lse - safe)
        keep = tl.exp2(top - safe)
        total = total * keep + tl.sum(weight, 0)
        acc = acc * keep + tl.sum(o.to(tl.float32) * weight[:, None], 0)
        top = new_top
    if SINKS:
        sink = tl.load(sinks + head) * LOG2_E
        new_top = tl.maximum(top, sink)
        keep = tl.exp2(top - new_top)
        total = total * keep + tl.exp2(sink - new_top)
        acc = acc * keep
    acc = acc / total
    at_row = out + row.to(tl.int64) * out_stride + head * V_DIM
    if V_BLOCK != V_DIM:
        tl.store(at_row + dim, acc.to(out.dtype.element_ty), mask=dim < V_DIM)
    else:
        tl.store(at_row + dim, acc.to(out.dtype.element_ty))
