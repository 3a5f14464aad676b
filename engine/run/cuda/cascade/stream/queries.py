"""A warpgroup's queries: read, turned to where their chunk was computed, and handed to the tensor cores."""

# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call"
from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared

from engine.run.cuda.cascade import records
from engine.run.cuda.cascade.kernel import AS_IS, BACK
from engine.run.cuda.cascade.stream.items import PAIR, ROWS

AT_POSITIONS = gl.constexpr(records.AT_POSITIONS)
NOT_TURNED = gl.constexpr(AS_IS)
TURNED_BACK = gl.constexpr(BACK)


@gluon.constexpr_function
def rows_layout(width):
    """Rows of ``width`` 16-bit elements over a warpgroup, 16 bytes a thread."""
    return gl.BlockedLayout([1, 8], [256 // width, width // 8], [4, 1], [1, 0])


@gluon.jit
def rows_of(lists, pairs_at, row0, rows_end, RATIO: gl.constexpr, K_BLOCK: gl.constexpr):
    """A warpgroup's packed rows: the query row of each, and its pair's offset."""
    packed = row0 + gl.arange(0, ROWS, gl.SliceLayout(1, rows_layout(K_BLOCK)))
    live = packed < rows_end
    pair = lists + pairs_at + (packed // RATIO) * PAIR
    return gl.load(pair, mask=live, other=0), gl.load(pair + 1, mask=live, other=0)


@gluon.jit
def angles_of(lists, dynamic, row, offset, TURN: gl.constexpr):
    """By how many positions each row is turned. Rows that are not live are turned like row 0."""
    if TURN == NOT_TURNED:
        return offset
    if TURN == TURNED_BACK:
        return offset
    return gl.load(lists + gl.load(lists + dynamic + AT_POSITIONS) + row) - offset


@gluon.jit
def load_query(
    q, q_stride, row, angle, row0, rows_end, head, cos, sin,
    TURN: gl.constexpr, RATIO: gl.constexpr, K_DIM: gl.constexpr, K_BLOCK: gl.constexpr, FIRST: gl.constexpr,
    TURN_PAIRS: gl.constexpr, INTERLEAVED: gl.constexpr,
):  # fmt: skip
    """A warpgroup's queries (ROWS, K_BLOCK), each turned by its pair's angle in fp32 and rounded once."""
    packed = row0 + gl.arange(0, ROWS, gl.SliceLayout(1, rows_layout(K_BLOCK)))
    dim = gl.arange(0, K_BLOCK, gl.SliceLayout(0, rows_layout(K_BLOCK)))
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
def publish(q_smem, x):
    """A warpgroup's queries into shared memory, for the tensor cores."""
    gl.thread_barrier()
    q_smem.store(x)
    fence_async_shared()
    gl.thread_barrier()
