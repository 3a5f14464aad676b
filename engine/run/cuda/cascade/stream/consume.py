"""A warpgroup: its rows of item after item, from the ring to partial results."""

# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call"
from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.language.extra.cuda import gdc_wait

from engine.run.cuda.cascade.stream.items import PAIR, ROWS, fields_of, grid_of, item_at, items_of, unit_at, units_of
from engine.run.cuda.cascade.stream.queries import angles_of, load_query, publish, rows_layout, rows_of
from engine.run.cuda.cascade.stream.scores import begins_of, capped, ends_of, hidden, masked_scores, softmax


@gluon.jit
def consume(
    q, q_stride, lists, dynamic, class_index, cos, sin, partial_out, partial_lse, scale, squeeze,
    q_smem, k_smem, v_smem, k_full, k_empty, v_full, v_empty, GROUP: gl.constexpr,
    TURN: gl.constexpr, RATIO: gl.constexpr, KV_HEADS: gl.constexpr, K_DIM: gl.constexpr, V_DIM: gl.constexpr,
    K_BLOCK: gl.constexpr, V_BLOCK: gl.constexpr, FIRST: gl.constexpr, TURN_PAIRS: gl.constexpr,
    INTERLEAVED: gl.constexpr, N: gl.constexpr, STAGES: gl.constexpr, OVERLAP: gl.constexpr, BACKWARDS: gl.constexpr,
    CAUSAL: gl.constexpr, WINDOW: gl.constexpr, SOFTCAP: gl.constexpr,
):  # fmt: skip
    """Warpgroup GROUP: its 64 rows of every item of this program."""
    step = 0
    static_items, items, static_at, dynamic_at = items_of(lists, dynamic, class_index)
    if OVERLAP:
        gdc_wait()
    # What an item's queries depend on is loaded while the item before it runs.
    units = units_of(items * KV_HEADS)
    index = unit_at(0, units, BACKWARDS)
    item = item_at(index // KV_HEADS, lists, static_items, static_at, dynamic_at)
    pairs_at, row0, rows_end, begin, full_end, end, split, full_begin = fields_of(item, units > 0, GROUP, WINDOW)
    row, offset = rows_of(lists, pairs_at, row0, rows_end, RATIO, K_BLOCK)
    angle = angles_of(lists, dynamic, row, offset, TURN)
    for unit in range(units):
        head = unit_at(unit, units, BACKWARDS) % KV_HEADS
        following = unit_at(unit + 1, units, BACKWARDS)
        item = item_at(following // KV_HEADS, lists, static_items, static_at, dynamic_at)
        next_pairs_at, next_row0, next_rows_end, next_begin, next_full_end, next_end, next_split, next_full_begin = (
            fields_of(item, unit + 1 < units, GROUP, WINDOW)
        )
        blocks = (end - grid_of(begin, N, WINDOW) + N - 1) // N
        if row0 < rows_end:
            step, next_row, next_offset = _attend_item(
                q, q_stride, lists, row, angle, pairs_at, row0, rows_end, split,
                next_pairs_at, next_row0, next_rows_end, head, begin, full_begin, full_end, end, blocks, step, cos, sin,
                partial_out, partial_lse, scale, squeeze, q_smem, k_smem, v_smem, k_full, k_empty, v_full, v_empty,
                TURN, RATIO, KV_HEADS, K_DIM, V_DIM, K_BLOCK, V_BLOCK, FIRST, TURN_PAIRS, INTERLEAVED, N, STAGES,
                CAUSAL, WINDOW, SOFTCAP,
            )  # fmt: skip
        else:
            next_row, next_offset = rows_of(lists, next_pairs_at, next_row0, next_rows_end, RATIO, K_BLOCK)
            step = _pass(blocks, step, k_full, k_empty, v_full, v_empty, STAGES)
        row = next_row
        angle = angles_of(lists, dynamic, next_row, next_offset, TURN)
        pairs_at, row0, rows_end = next_pairs_at, next_row0, next_rows_end
        begin, full_end, end, split = next_begin, next_full_end, next_end, next_split
        full_begin = next_full_begin


@gluon.jit
def _attend_item(
    q, q_stride, lists, row, angle, pairs_at, row0, rows_end, split, next_pairs_at, next_row0, next_rows_end,
    head, begin, full_begin, full_end, end, blocks, step, cos, sin, partial_out, partial_lse, scale, squeeze,
    q_smem, k_smem, v_smem, k_full, k_empty, v_full, v_empty,
    TURN: gl.constexpr, RATIO: gl.constexpr, KV_HEADS: gl.constexpr, K_DIM: gl.constexpr, V_DIM: gl.constexpr,
    K_BLOCK: gl.constexpr, V_BLOCK: gl.constexpr, FIRST: gl.constexpr, TURN_PAIRS: gl.constexpr,
    INTERLEAVED: gl.constexpr, N: gl.constexpr, STAGES: gl.constexpr, CAUSAL: gl.constexpr, WINDOW: gl.constexpr,
    SOFTCAP: gl.constexpr,
):  # fmt: skip
    """One item for one warpgroup's rows, blocks from the last to the first.

    Returns the ring's next step, and the rows and offsets of the item that follows.
    """
    S: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, N, 16])
    O: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, V_BLOCK, 16])  # noqa: E741
    P: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=O, k_width=2)
    publish(q_smem, load_query(
        q, q_stride, row, angle, row0, rows_end, head, cos, sin, TURN, RATIO, K_DIM, K_BLOCK, FIRST, TURN_PAIRS,
        INTERLEAVED,
    ))  # fmt: skip
    grid = grid_of(begin, N, WINDOW)
    valid = end - grid - (blocks - 1) * N
    seen_to = ends_of(lists, pairs_at, row0, rows_end, grid, end, RATIO, S, CAUSAL)
    seen_from = begins_of(lists, pairs_at, row0, rows_end, grid, RATIO, S, WINDOW)
    masked = blocks - gl.maximum(full_end - grid, 0) // N
    masked_again = blocks - (full_begin - grid + N - 1) // N
    zero = gl.zeros([ROWS, N], gl.float32, S)
    acc = gl.zeros([ROWS, V_BLOCK], gl.float32, O)
    at, phase = step % STAGES, step // STAGES & 1
    mbarrier.wait(k_full.index(at), phase)
    scores = warpgroup_mma(q_smem, k_smem.index(at).permute((1, 0)), zero, use_acc=False)
    _let_go(k_empty.index(at))
    scores = masked_scores(capped(scores, squeeze, SOFTCAP), (blocks - 1) * N, seen_from, seen_to, N, S, WINDOW)
    top = gl.full([ROWS], float("-inf"), gl.float32, gl.SliceLayout(1, S))
    total = gl.zeros([ROWS], gl.float32, gl.SliceLayout(1, S))
    p, top, total, keep = softmax(scores, top, total, scale, CAUSAL, WINDOW)
    p = gl.convert_layout(p.to(q.dtype.element_ty), P)
    mbarrier.wait(v_full.index(at), phase)
    _clear_outside(v_smem.index(at), 0, valid, N, V_BLOCK)
    next_row, next_offset = rows_of(lists, next_pairs_at, next_row0, next_rows_end, RATIO, K_BLOCK)
    for number in range(1, blocks):
        last, last_phase = at, phase
        step += 1
        at, phase = step % STAGES, step // STAGES & 1
        mbarrier.wait(k_full.index(at), phase)
        scores_ahead = warpgroup_mma(q_smem, k_smem.index(at).permute((1, 0)), zero, use_acc=False, is_async=True)
        mbarrier.wait(v_full.index(last), last_phase)
        acc_ahead = warpgroup_mma(p, v_smem.index(last), acc, is_async=True)
        scores = warpgroup_mma_wait(1, deps=[scores_ahead])
        _let_go(k_empty.index(at))
        scores = hidden(
            capped(scores, squeeze, SOFTCAP), (blocks - 1 - number) * N, number < masked, number >= masked_again,
            seen_from, seen_to, N, S, CAUSAL, WINDOW,
        )  # fmt: skip
        weights, top, total, keep = softmax(scores, top, total, scale, CAUSAL, WINDOW)
        acc, p = warpgroup_mma_wait(0, deps=[acc_ahead, p])
        _let_go(v_empty.index(last))
        acc = acc * gl.convert_layout(keep, gl.SliceLayout(1, O))[:, None]
        p = gl.convert_layout(weights.to(q.dtype.element_ty), P)
    mbarrier.wait(v_full.index(at), phase)
    if WINDOW:
        _clear_outside(v_smem.index(at), begin - grid, N, N, V_BLOCK)
    acc = warpgroup_mma(p, v_smem.index(at), acc)
    _let_go(v_empty.index(at))
    _store(
        acc, top * scale + gl.log2(total), total, partial_out, partial_lse, lists, pairs_at, row0, rows_end, head,
        begin, end, split, RATIO, KV_HEADS, V_DIM, V_BLOCK, CAUSAL, WINDOW,
    )  # fmt: skip
    return step + 1, next_row, next_offset


@gluon.jit
def _pass(blocks, step, k_full, k_empty, v_full, v_empty, STAGES: gl.constexpr):
    """What a warpgroup without rows does for an item: it lets every block go."""
    for _ in range(blocks):
        at = step % STAGES
        phase = step // STAGES & 1
        mbarrier.wait(k_full.index(at), phase)
        mbarrier.arrive(k_empty.index(at), count=1)
        mbarrier.wait(v_full.index(at), phase)
        mbarrier.arrive(v_empty.index(at), count=1)
        step += 1
    return step


@gluon.jit
def _let_go(empty):
    """A warpgroup has read a stage."""
    gl.thread_barrier()
    mbarrier.arrive(empty, count=1)


@gluon.jit
def _clear_outside(block, first, end, N: gl.constexpr, V_BLOCK: gl.constexpr):
    """Zeros in the rows of a shared (N, V_BLOCK) block before ``first`` and from ``end`` on.

    Warpgroups that share it write the same.
    """
    if (first > 0) | (end < N):
        layout: gl.constexpr = rows_layout(V_BLOCK)
        token = gl.arange(0, N, gl.SliceLayout(1, layout))
        x = block.load(layout)
        inside = (token >= first) & (token < end)
        block.store(gl.where(inside[:, None], x, gl.zeros_like(x)))
        fence_async_shared()
        gl.thread_barrier()


@gluon.jit
def _store(
    acc, lse, total, partial_out, partial_lse, lists, pairs_at, row0, rows_end, head, begin, end, split,
    RATIO: gl.constexpr, KV_HEADS: gl.constexpr, V_DIM: gl.constexpr, V_BLOCK: gl.constexpr, CAUSAL: gl.constexpr,
    WINDOW: gl.constexpr,
):  # fmt: skip
    """Writes a warpgroup's normalised partial results, (ROWS, V_DIM) and (ROWS,), of rows that see some of it."""
    rows: gl.constexpr = gl.SliceLayout(1, acc.type.layout)
    packed = row0 + gl.arange(0, ROWS, rows)
    live = packed < rows_end
    pair = lists + pairs_at + (packed // RATIO) * PAIR
    partial = gl.load(pair + 3, mask=live, other=0) + split
    seen = live
    if CAUSAL:
        seen = seen & (gl.load(pair + 2, mask=live, other=0) > begin)
    if WINDOW:
        seen = seen & (gl.load(pair + 4, mask=live, other=0) < end)
    into = (partial * KV_HEADS + head) * RATIO + packed % RATIO
    gl.store(partial_lse + into, gl.convert_layout(lse, rows), mask=seen)
    dim = gl.arange(0, V_BLOCK, gl.SliceLayout(0, acc.type.layout))
    acc = acc / gl.convert_layout(total, rows)[:, None]
    out = partial_out + into.to(gl.int64)[:, None] * V_DIM + dim[None, :]
    stored = seen[:, None]
    if V_BLOCK != V_DIM:
        stored = stored & (dim < V_DIM)[None, :]
    gl.store(out, acc.to(partial_out.dtype.element_ty), mask=stored)
