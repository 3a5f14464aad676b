"""The chunk kernel for Hopper, in Gluon: keys and values stream through the bulk copy engine ahead of the arithmetic.

    one producer warp        waits for empty -> copies K, V blocks of item after item into a ring of stages
    1 or 2 warpgroups        64 packed rows each, sharing the ring; per block, asynchronously:

        tensor cores   S1 = Q K1'  O += P0 V0   S2 = Q K2'  O += P1 V1
        the rest           softmax(S1) -> P1        softmax(S2) -> P2        (while O += P V runs)

The producer runs on into the next item while the last one is finished. Blocks of an item go from its last, the only
one that may be ragged, to its first: the mask stays out of the loop. Behind a ragged end, values are overwritten by
zeros in shared memory, so that nothing beyond a chunk is ever summed. Items are splits of chunks (neighbouring slots,
one copy a block) and of tails (one copy a page, where their slots are no neighbours).

``CAUSAL``: rows of a tail with several new ones see a part each of what their tile reads. Blocks that a row does not
see come before its own last block, and leave its maximum, sum and output as they were (-inf, 0, 0): it has the bits
that it has as the only new row of its tail, which needs no mask per row and takes the loop without one.

``WINDOW``: rows do not see what comes before their first token. Blocks lie where they lie without, and an item's first
is the one that holds the first token that a row of its tile sees; what lies before that in it becomes zeros in shared
memory too. Blocks before a row's own first come behind its others and leave its results as they are, to the bit.

Heads whose width is no power of two are padded: a copy brings some of the next head along (zeros behind the last
one), which zeros in the queries take out of the scores, and which is not stored.

Importing this module needs Triton with Gluon; running it, compute capability 9.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call"
from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from engine.run.cuda.cascade import work
from engine.run.cuda.cascade.kernel import AS_IS, BACK

ITEM = gl.constexpr(work.ITEM)
PAIR = gl.constexpr(work.PAIR)
AT_COUNTS = gl.constexpr(work.AT_COUNTS)
AT_ITEMS = gl.constexpr(work.AT_ITEMS)
AT_POSITIONS = gl.constexpr(work.AT_POSITIONS)
AT_PAGES = gl.constexpr(work.AT_PAGES)
NOT_TURNED = gl.constexpr(AS_IS)
TURNED_BACK = gl.constexpr(BACK)
ROWS = gl.constexpr(64)  # packed rows of a warpgroup
PRODUCER_REGISTERS = gl.constexpr(40)
CONSUMER_REGISTERS = gl.constexpr(232)  # two warpgroups; a single one gets what is left


@gluon.constexpr_function
def _rows_layout(width):
    """Rows of ``width`` 16-bit elements over a warpgroup, 16 bytes a thread."""
    return gl.BlockedLayout([1, 8], [256 // width, width // 8], [4, 1], [1, 0])


@gluon.jit
def _rows_of(lists, pairs_at, row0, rows_end, RATIO: gl.constexpr, K_BLOCK: gl.constexpr):
    """A warpgroup's packed rows: the query row of each, and its pair's offset."""
    packed = row0 + gl.arange(0, ROWS, gl.SliceLayout(1, _rows_layout(K_BLOCK)))
    live = packed < rows_end
    pair = lists + pairs_at + (packed // RATIO) * PAIR
    return gl.load(pair, mask=live, other=0), gl.load(pair + 1, mask=live, other=0)


@gluon.jit
def _seen_to(lists, pairs_at, row0, rows_end, begin, end, RATIO: gl.constexpr, S: gl.constexpr, CAUSAL: gl.constexpr):
    """Where, counted from ``begin``, the tokens of a split end that each row of a warpgroup sees."""
    if not CAUSAL:
        return gl.zeros([ROWS], gl.int32, gl.SliceLayout(1, S)) + (end - begin)
    packed = row0 + gl.arange(0, ROWS, gl.SliceLayout(1, S))
    limit = gl.load(lists + pairs_at + (packed // RATIO) * PAIR + 2, mask=packed < rows_end, other=0)
    return gl.minimum(limit, end) - begin


@gluon.jit
def _seen_from(lists, pairs_at, row0, rows_end, begin, RATIO: gl.constexpr, S: gl.constexpr, WINDOW: gl.constexpr):
    """Where, counted from ``begin``, they begin."""
    if not WINDOW:
        return gl.zeros([ROWS], gl.int32, gl.SliceLayout(1, S))
    packed = row0 + gl.arange(0, ROWS, gl.SliceLayout(1, S))
    return gl.load(lists + pairs_at + (packed // RATIO) * PAIR + 4, mask=packed < rows_end, other=0) - begin


@gluon.jit
def _masked(scores, first, seen_from, seen_to, N: gl.constexpr, S: gl.constexpr, WINDOW: gl.constexpr):
    """Scores (rows, N) of the tokens from ``first`` on, -inf of those that a row does not see."""
    token = first + gl.arange(0, N, gl.SliceLayout(0, S))
    seen = token[None, :] < seen_to[:, None]
    if WINDOW:
        seen = seen & (token[None, :] >= seen_from[:, None])
    return gl.where(seen, scores, float("-inf"))


@gluon.jit
def _hidden(
    scores, first, ends, begins, seen_from, seen_to,
    N: gl.constexpr, S: gl.constexpr, CAUSAL: gl.constexpr, WINDOW: gl.constexpr,
):  # fmt: skip
    """``_masked`` where what some row sees ``ends`` or ``begins`` in the block."""
    if CAUSAL:  # noqa: SIM102 (a compile-time condition around one of a value)
        if ends:
            scores = _masked(scores, first, seen_from, seen_to, N, S, WINDOW)
    if WINDOW:  # noqa: SIM102
        if begins:
            scores = _masked(scores, first, seen_from, seen_to, N, S, WINDOW)
    return scores


@gluon.jit
def _capped(scores, squeeze, SOFTCAP: gl.constexpr):
    """As ``capped`` of the Triton kernel, if SOFTCAP."""
    if not SOFTCAP:
        return scores
    return 1.0 - 2.0 / (gl.exp2(scores * squeeze) + 1.0)


@gluon.jit
def _angles_of(lists, dynamic, row, offset, TURN: gl.constexpr):
    """By how many positions each row is turned. Rows that are not live are turned like row 0."""
    if TURN == NOT_TURNED:
        return offset
    if TURN == TURNED_BACK:
        return offset
    return gl.load(lists + gl.load(lists + dynamic + AT_POSITIONS) + row) - offset


@gluon.jit
def _load_query(
    q, q_stride, row, angle, row0, rows_end, head, cos, sin,
    TURN: gl.constexpr, RATIO: gl.constexpr, K_DIM: gl.constexpr, K_BLOCK: gl.constexpr, FIRST: gl.constexpr,
    TURN_PAIRS: gl.constexpr, INTERLEAVED: gl.constexpr,
):  # fmt: skip
    """A warpgroup's queries (ROWS, K_BLOCK), each turned by its pair's angle in fp32 and rounded once."""
    packed = row0 + gl.arange(0, ROWS, gl.SliceLayout(1, _rows_layout(K_BLOCK)))
    dim = gl.arange(0, K_BLOCK, gl.SliceLayout(0, _rows_layout(K_BLOCK)))
    live = packed < rows_end
    base = row.to(gl.int64) * q_stride + (head * RATIO + packed % RATIO) * K_DIM
    inside = live[:, None]
    if K_BLOCK != K_DIM:
        inside = inside & (dim < K_DIM)[None, :]
    x = gl.load(q + base[:, None] + dim[None, :], mask=inside, other=0.0)
    if TURN == NOT_TURNED:
        return x
    own = dim - FIRST
    turns = (own >= 0) & (own < 2 * TURN_PAIRS)
    if INTERLEAVED:
        number = own // 2
        first = own % 2 == 0
        partner = gl.where(turns, gl.where(first, dim + 1, dim - 1), dim)
    else:
        number = own % TURN_PAIRS
        first = own < TURN_PAIRS
        partner = gl.where(turns, gl.where(first, dim + TURN_PAIRS, dim - TURN_PAIRS), dim)
    other = gl.load(q + base[:, None] + partner[None, :], mask=inside, other=0.0).to(gl.float32)
    at = angle.to(gl.int64)[:, None] * TURN_PAIRS + number[None, :]
    known = live[:, None] & turns[None, :]
    c = gl.load(cos + at, mask=known, other=1.0)
    s = gl.load(sin + at, mask=known, other=0.0)
    plus = first if TURN == TURNED_BACK else first == 0
    other = gl.where(plus[None, :], other, -other)
    return (x.to(gl.float32) * c + other * s).to(x.dtype)


@gluon.jit
def _let_go(empty):
    """A warpgroup has read a stage."""
    gl.thread_barrier()
    mbarrier.arrive(empty, count=1)


@gluon.jit
def _publish(q_smem, x):
    """A warpgroup's queries into shared memory, for the tensor cores."""
    gl.thread_barrier()
    q_smem.store(x)
    fence_async_shared()
    gl.thread_barrier()


@gluon.jit
def _softmax(scores, top, total, scale, CAUSAL: gl.constexpr, WINDOW: gl.constexpr):
    """One block of scores: p (fp32), the new maximum and sum, and what to multiply earlier results by.

    A row that has seen nothing yet, as there may be if CAUSAL, keeps a maximum of -inf and a sum of 0. If WINDOW, the
    factor of an unchanged maximum is 1, where a fused multiplication could round it.
    """
    new_top = gl.maximum(top, gl.max(scores, 1))
    scaled = new_top * scale
    if CAUSAL:
        scaled = gl.where(new_top == float("-inf"), 0.0, scaled)
    p = gl.exp2(scores * scale - scaled[:, None])
    keep = gl.exp2(top * scale - scaled)
    if WINDOW:
        keep = gl.where(new_top == top, 1.0, keep)
    return p, new_top, total * keep + gl.sum(p, 1), keep


@gluon.jit
def _clear_outside(block, first, end, N: gl.constexpr, V_BLOCK: gl.constexpr):
    """Zeros in the rows of a shared (N, V_BLOCK) block before ``first`` and from ``end`` on.

    Warpgroups that share it write the same.
    """
    if (first > 0) | (end < N):
        layout: gl.constexpr = _rows_layout(V_BLOCK)
        token = gl.arange(0, N, gl.SliceLayout(1, layout))
        x = block.load(layout)
        inside = (token >= first) & (token < end)
        block.store(gl.where(inside[:, None], x, gl.zeros_like(x)))
        fence_async_shared()
        gl.thread_barrier()


@gluon.jit
def _items(lists, dynamic, class_index):
    """How many items are static, how many there are, and where the static and the dynamic ones begin."""
    static_items = gl.load(lists + AT_COUNTS + class_index)
    items = static_items + gl.load(lists + dynamic + AT_COUNTS + class_index)
    static_at = gl.load(lists + AT_ITEMS + class_index)
    return static_items, items, static_at, gl.load(lists + dynamic + AT_ITEMS + class_index)


@gluon.jit
def _item_at(number, lists, static_items, static_at, dynamic_at):
    """The item of that number: the static ones first."""
    at = gl.where(number < static_items, static_at + number * ITEM, dynamic_at + (number - static_items) * ITEM)
    return lists + at


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
def _consume(
    q, q_stride, lists, dynamic, class_index, cos, sin, partial_out, partial_lse, scale, squeeze,
    q_smem, k_smem, v_smem, k_full, k_empty, v_full, v_empty, GROUP: gl.constexpr,
    TURN: gl.constexpr, RATIO: gl.constexpr, KV_HEADS: gl.constexpr, K_DIM: gl.constexpr, V_DIM: gl.constexpr,
    K_BLOCK: gl.constexpr, V_BLOCK: gl.constexpr, FIRST: gl.constexpr, TURN_PAIRS: gl.constexpr,
    INTERLEAVED: gl.constexpr, N: gl.constexpr, STAGES: gl.constexpr, OVERLAP: gl.constexpr, BACKWARDS: gl.constexpr,
    CAUSAL: gl.constexpr, WINDOW: gl.constexpr, SOFTCAP: gl.constexpr,
):  # fmt: skip
    """Warpgroup GROUP: its 64 rows of every item of this program."""
    step = 0
    static_items, items, static_at, dynamic_at = _items(lists, dynamic, class_index)
    if OVERLAP:
        gdc_wait()
    # What an item's queries depend on is loaded while the item before it runs.
    units = _units(items * KV_HEADS)
    index = _unit_at(0, units, BACKWARDS)
    item = _item_at(index // KV_HEADS, lists, static_items, static_at, dynamic_at)
    pairs_at, row0, rows_end, begin, full_end, end, split, full_begin = _fields(item, units > 0, GROUP, WINDOW)
    row, offset = _rows_of(lists, pairs_at, row0, rows_end, RATIO, K_BLOCK)
    angle = _angles_of(lists, dynamic, row, offset, TURN)
    for unit in range(units):
        head = _unit_at(unit, units, BACKWARDS) % KV_HEADS
        following = _unit_at(unit + 1, units, BACKWARDS)
        item = _item_at(following // KV_HEADS, lists, static_items, static_at, dynamic_at)
        next_pairs_at, next_row0, next_rows_end, next_begin, next_full_end, next_end, next_split, next_full_begin = (
            _fields(item, unit + 1 < units, GROUP, WINDOW)
        )
        blocks = (end - _grid(begin, N, WINDOW) + N - 1) // N
        if row0 < rows_end:
            step, next_row, next_offset = _attend_item(
                q, q_stride, lists, row, angle, pairs_at, row0, rows_end, split,
                next_pairs_at, next_row0, next_rows_end, head, begin, full_begin, full_end, end, blocks, step, cos, sin,
                partial_out, partial_lse, scale, squeeze, q_smem, k_smem, v_smem, k_full, k_empty, v_full, v_empty,
                TURN, RATIO, KV_HEADS, K_DIM, V_DIM, K_BLOCK, V_BLOCK, FIRST, TURN_PAIRS, INTERLEAVED, N, STAGES,
                CAUSAL, WINDOW, SOFTCAP,
            )  # fmt: skip
        else:
            next_row, next_offset = _rows_of(lists, next_pairs_at, next_row0, next_rows_end, RATIO, K_BLOCK)
            step = _pass(blocks, step, k_full, k_empty, v_full, v_empty, STAGES)
        row = next_row
        angle = _angles_of(lists, dynamic, next_row, next_offset, TURN)
        pairs_at, row0, rows_end = next_pairs_at, next_row0, next_rows_end
        begin, full_end, end, split = next_begin, next_full_end, next_end, next_split
        full_begin = next_full_begin


@gluon.jit
def _units(total):
    """How many (item, head) units this program has: every num_programs-th."""
    return gl.maximum((total - gl.program_id(0) + gl.num_programs(0) - 1) // gl.num_programs(0), 0)


@gluon.jit
def _unit_at(number, units, BACKWARDS: gl.constexpr):
    """This program's unit of that number. The second half of the programs goes backwards, tails first."""
    if BACKWARDS:
        number = gl.where(gl.program_id(0) * 2 >= gl.num_programs(0), units - 1 - number, number)
    return gl.program_id(0) + number * gl.num_programs(0)


@gluon.jit
def _grid(begin, N: gl.constexpr, WINDOW: gl.constexpr):
    """Where the first block of an item begins: splits are multiples of N."""
    if WINDOW:
        return begin // N * N
    return begin


@gluon.jit
def _fields(item, known, GROUP: gl.constexpr, WINDOW: gl.constexpr):
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
    _publish(q_smem, _load_query(
        q, q_stride, row, angle, row0, rows_end, head, cos, sin, TURN, RATIO, K_DIM, K_BLOCK, FIRST, TURN_PAIRS,
        INTERLEAVED,
    ))  # fmt: skip
    grid = _grid(begin, N, WINDOW)
    valid = end - grid - (blocks - 1) * N
    seen_to = _seen_to(lists, pairs_at, row0, rows_end, grid, end, RATIO, S, CAUSAL)
    seen_from = _seen_from(lists, pairs_at, row0, rows_end, grid, RATIO, S, WINDOW)
    masked = blocks - gl.maximum(full_end - grid, 0) // N
    masked_again = blocks - (full_begin - grid + N - 1) // N
    zero = gl.zeros([ROWS, N], gl.float32, S)
    acc = gl.zeros([ROWS, V_BLOCK], gl.float32, O)
    at, phase = step % STAGES, step // STAGES & 1
    mbarrier.wait(k_full.index(at), phase)
    scores = warpgroup_mma(q_smem, k_smem.index(at).permute((1, 0)), zero, use_acc=False)
    _let_go(k_empty.index(at))
    scores = _masked(_capped(scores, squeeze, SOFTCAP), (blocks - 1) * N, seen_from, seen_to, N, S, WINDOW)
    top = gl.full([ROWS], float("-inf"), gl.float32, gl.SliceLayout(1, S))
    total = gl.zeros([ROWS], gl.float32, gl.SliceLayout(1, S))
    p, top, total, keep = _softmax(scores, top, total, scale, CAUSAL, WINDOW)
    p = gl.convert_layout(p.to(q.dtype.element_ty), P)
    mbarrier.wait(v_full.index(at), phase)
    _clear_outside(v_smem.index(at), 0, valid, N, V_BLOCK)
    next_row, next_offset = _rows_of(lists, next_pairs_at, next_row0, next_rows_end, RATIO, K_BLOCK)
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
        scores = _hidden(
            _capped(scores, squeeze, SOFTCAP), (blocks - 1 - number) * N, number < masked, number >= masked_again,
            seen_from, seen_to, N, S, CAUSAL, WINDOW,
        )  # fmt: skip
        weights, top, total, keep = _softmax(scores, top, total, scale, CAUSAL, WINDOW)
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


@gluon.jit
def _produce(
    key_blocks, value_blocks, key_pages, value_pages, lists, dynamic, class_index,
    k_smem, v_smem, k_full, k_empty, v_full, v_empty,
    KV_HEADS: gl.constexpr, K_DIM: gl.constexpr, V_DIM: gl.constexpr, N: gl.constexpr, PAGE: gl.constexpr,
    STAGES: gl.constexpr, OVERLAP: gl.constexpr, BACKWARDS: gl.constexpr, WINDOW: gl.constexpr,
):  # fmt: skip
    """One warp: copies the blocks of every item of this program, as stages become empty."""
    pages_at = gl.load(lists + dynamic + AT_PAGES)
    step = 0
    static_items, items, static_at, dynamic_at = _items(lists, dynamic, class_index)
    if OVERLAP:
        gdc_wait()
    units = _units(items * KV_HEADS)
    for unit in range(units):
        index = _unit_at(unit, units, BACKWARDS)
        item = _item_at(index // KV_HEADS, lists, static_items, static_at, dynamic_at)
        k_column = index % KV_HEADS * K_DIM
        v_column = index % KV_HEADS * V_DIM
        source = gl.load(item + 3)
        begin = gl.load(item + 4)
        end = gl.load(item + 6)
        grid = _grid(begin, N, WINDOW)
        blocks = (end - grid + N - 1) // N
        for back in range(1, blocks + 1):
            first = grid + (blocks - back) * N
            at = step % STAGES
            empty = (step // STAGES & 1) ^ 1
            if source >= 0:
                slot = source + first
                mbarrier.wait(k_empty.index(at), empty)
                mbarrier.expect(k_full.index(at), key_blocks.block_type.nbytes)
                tma.async_copy_global_to_shared(key_blocks, [slot, k_column], k_full.index(at), k_smem.index(at))
                mbarrier.wait(v_empty.index(at), empty)
                mbarrier.expect(v_full.index(at), value_blocks.block_type.nbytes)
                tma.async_copy_global_to_shared(value_blocks, [slot, v_column], v_full.index(at), v_smem.index(at))
            else:
                table = lists + pages_at + ~source
                _copy_pages(key_pages, table, first, begin, end, k_column, k_full.index(at), k_empty.index(at), empty,
                            k_smem.index(at), N, PAGE, WINDOW)  # fmt: skip
                _copy_pages(value_pages, table, first, begin, end, v_column, v_full.index(at), v_empty.index(at), empty,
                            v_smem.index(at), N, PAGE, WINDOW)  # fmt: skip
            step += 1


@gluon.jit
def _copy_pages(
    pages, table, first, begin, end, column, full, empty, phase, block, N: gl.constexpr, PAGE: gl.constexpr,
    WINDOW: gl.constexpr,
):  # fmt: skip
    """Pages of tokens ``first .. first + N - 1`` into a block; behind the last page, that page again.

    If WINDOW, pages before that of ``begin``, which may be another's by now, are that of ``begin``.
    """
    last = (end - 1) // PAGE
    mbarrier.wait(empty, phase)
    mbarrier.expect(full, pages.block_type.nbytes * (N // PAGE))
    for i in gl.static_range(N // PAGE):
        wanted = gl.minimum(first // PAGE + i, last)
        if WINDOW:
            wanted = gl.maximum(wanted, begin // PAGE)
        page = gl.load(table + wanted)
        tma.async_copy_global_to_shared(pages, [page * PAGE, column], full, block.slice(i * PAGE, PAGE))


@gluon.jit(do_not_specialize=["class_index"])
def stream(
    q, q_stride, key_blocks, value_blocks, key_pages, value_pages, lists, dynamic, class_index, cos, sin,
    partial_out, partial_lse, scale, squeeze,
    TURN: gl.constexpr, RATIO: gl.constexpr, KV_HEADS: gl.constexpr, K_DIM: gl.constexpr, V_DIM: gl.constexpr,
    K_BLOCK: gl.constexpr, V_BLOCK: gl.constexpr, FIRST: gl.constexpr, TURN_PAIRS: gl.constexpr,
    INTERLEAVED: gl.constexpr, GROUPS: gl.constexpr, N: gl.constexpr, PAGE: gl.constexpr, STAGES: gl.constexpr,
    OVERLAP: gl.constexpr, BACKWARDS: gl.constexpr, CAUSAL: gl.constexpr, WINDOW: gl.constexpr, SOFTCAP: gl.constexpr,
):  # fmt: skip
    """All items of one tile class, of 64 * GROUPS packed rows, GROUPS 1 or 2. 4 warps."""
    if OVERLAP:
        gdc_launch_dependents()
    k_smem = gl.allocate_shared_memory(key_blocks.dtype, [STAGES, N, K_BLOCK], key_blocks.layout)
    v_smem = gl.allocate_shared_memory(value_blocks.dtype, [STAGES, N, V_BLOCK], value_blocks.layout)
    q_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([ROWS, K_BLOCK], key_blocks.dtype)
    q_smem = gl.allocate_shared_memory(key_blocks.dtype, [GROUPS, ROWS, K_BLOCK], q_layout)
    k_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    k_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(k_full.index(i), count=1)
        mbarrier.init(k_empty.index(i), count=GROUPS)
        mbarrier.init(v_full.index(i), count=1)
        mbarrier.init(v_empty.index(i), count=GROUPS)
    fence_async_shared()
    # The tuples stand inside the calls: assigned to a name, their compile-time constants would become values.
    if GROUPS == 1:
        gl.warp_specialize([
            (_consume, (
                q, q_stride, lists, dynamic, class_index, cos, sin, partial_out, partial_lse, scale, squeeze,
                q_smem.index(0), k_smem, v_smem, k_full, k_empty, v_full, v_empty, 0,
                TURN, RATIO, KV_HEADS, K_DIM, V_DIM, K_BLOCK, V_BLOCK, FIRST, TURN_PAIRS, INTERLEAVED, N, STAGES,
                OVERLAP, BACKWARDS, CAUSAL, WINDOW, SOFTCAP,
            )),
            (_produce, (
                key_blocks, value_blocks, key_pages, value_pages, lists, dynamic, class_index,
                k_smem, v_smem, k_full, k_empty, v_full, v_empty, KV_HEADS, K_DIM, V_DIM, N, PAGE, STAGES, OVERLAP,
                BACKWARDS, WINDOW,
            )),
        ], [1], [PRODUCER_REGISTERS])  # fmt: skip
    else:
        gl.warp_specialize([
            (_consume, (
                q, q_stride, lists, dynamic, class_index, cos, sin, partial_out, partial_lse, scale, squeeze,
                q_smem.index(0), k_smem, v_smem, k_full, k_empty, v_full, v_empty, 0,
                TURN, RATIO, KV_HEADS, K_DIM, V_DIM, K_BLOCK, V_BLOCK, FIRST, TURN_PAIRS, INTERLEAVED, N, STAGES,
                OVERLAP, BACKWARDS, CAUSAL, WINDOW, SOFTCAP,
            )),
            (_consume, (
                q, q_stride, lists, dynamic, class_index, cos, sin, partial_out, partial_lse, scale, squeeze,
                q_smem.index(1), k_smem, v_smem, k_full, k_empty, v_full, v_empty, 1,
                TURN, RATIO, KV_HEADS, K_DIM, V_DIM, K_BLOCK, V_BLOCK, FIRST, TURN_PAIRS, INTERLEAVED, N, STAGES,
                OVERLAP, BACKWARDS, CAUSAL, WINDOW, SOFTCAP,
            )),
            (_produce, (
                key_blocks, value_blocks, key_pages, value_pages, lists, dynamic, class_index,
                k_smem, v_smem, k_full, k_empty, v_full, v_empty, KV_HEADS, K_DIM, V_DIM, N, PAGE, STAGES, OVERLAP,
                BACKWARDS, WINDOW,
            )),
        ], [4, 1], [CONSUMER_REGISTERS, PRODUCER_REGISTERS])  # fmt: skip
