# mypy: ignore-errors
"""What a borrowed model's captured forward has of ours beside attention, in Triton. Importing this needs Triton.

    norm         RMSNorm and the layer norms of modelling code, a row as it would be alone
    turn         queries and keys to their positions, as modelling code turns them
    gated        activation(gate) * up
    store        keys and values of the new tokens into the pool
    multiply     products in single precision, of which routers are made

Sums are fp32, in an order that follows from the width alone; rounding is where the module that is replaced rounds.
``OVERLAP``: see ``kernels``.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait


@triton.jit
def norm(
    x, x_row, x_inner, inner, weight, out, rows, eps,
    WEIGHTS: tl.constexpr, CENTRED: tl.constexpr, ROUNDED: tl.constexpr, PLUS: tl.constexpr, WEIGHED: tl.constexpr,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """Programs of ROWS rows: out[row] = x[row] / rms(x[row]) * weight[row % WEIGHTS]; less its mean first if CENTRED.

    Row ``i * inner + j`` of x lies at ``i * x_row + j * x_inner``.
    ROUNDED: to the dtype of x before the weight, else after it. The weight is PLUS + weight; none unless WEIGHED.
    """
    if OVERLAP:
        gdc_launch_dependents()
        gdc_wait()
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    dim = tl.arange(0, BLOCK)
    inside = (row < rows)[:, None] & (dim < WIDTH)[None, :]
    at = (row // inner) * x_row + (row % inner) * x_inner
    wide = tl.load(x + at[:, None] + dim[None, :], mask=inside, other=0.0).to(tl.float32)
    if CENTRED:
        wide = tl.where(inside, wide - (tl.sum(wide, 1) / WIDTH)[:, None], 0.0)
    scale = tl.rsqrt(tl.sum(wide * wide, 1) / WIDTH + eps)
    normed = wide * scale[:, None]
    if ROUNDED:
        normed = normed.to(out.dtype.element_ty).to(tl.float32)
    if WEIGHED:
        own = (row % WEIGHTS)[:, None] * WIDTH + dim[None, :]
        normed *= PLUS + tl.load(weight + own, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + row[:, None] * WIDTH + dim[None, :], normed.to(out.dtype.element_ty), mask=inside)


@triton.jit
def store(
    k, k_row, k_head, v, v_row, v_head, slots, keys, values,
    HEADS: tl.constexpr, K_DIM: tl.constexpr, V_DIM: tl.constexpr, K_BLOCK: tl.constexpr, V_BLOCK: tl.constexpr,
    HEADS_BLOCK: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """Programs (row,): keys[slots[row]] = k[row], values[slots[row]] = v[row]; heads and rows of k and v strided."""
    if OVERLAP:
        gdc_launch_dependents()
        gdc_wait()
    row = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots + row).to(tl.int64)
    head = tl.arange(0, HEADS_BLOCK)
    dim = tl.arange(0, K_BLOCK)
    inside = (head < HEADS)[:, None] & (dim < K_DIM)[None, :]
    given = tl.load(k + row * k_row + head[:, None] * k_head + dim[None, :], mask=inside)
    tl.store(keys + slot * (HEADS * K_DIM) + head[:, None] * K_DIM + dim[None, :], given, mask=inside)
    dim = tl.arange(0, V_BLOCK)
    inside = (head < HEADS)[:, None] & (dim < V_DIM)[None, :]
    given = tl.load(v + row * v_row + head[:, None] * v_head + dim[None, :], mask=inside)
    tl.store(values + slot * (HEADS * V_DIM) + head[:, None] * V_DIM + dim[None, :], given, mask=inside)


@triton.jit
def turn(
    q, q_row, q_head, k, k_row, k_head, cos, sin, cos_row, cos_dim, q_out, k_out,
    Q_HEADS: tl.constexpr, K_HEADS: tl.constexpr, D: tl.constexpr, PAIRS: tl.constexpr, INTERLEAVED: tl.constexpr,
    STEP: tl.constexpr, WIDE: tl.constexpr, Q_BLOCK: tl.constexpr, K_BLOCK: tl.constexpr, PAIRS_BLOCK: tl.constexpr,
    REST_BLOCK: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """Programs (row, 0: queries, 1: keys): out (rows, heads, D) = x with its pairs turned; see ``turning.TurnForm``."""
    if OVERLAP:
        gdc_launch_dependents()
        gdc_wait()
    row = tl.program_id(0).to(tl.int64)
    pair = tl.arange(0, PAIRS_BLOCK)
    angle = row * cos_row + pair * (STEP * cos_dim)
    c = tl.load(cos + angle, mask=pair < PAIRS, other=0.0).to(tl.float32)[None, :]
    s = tl.load(sin + angle, mask=pair < PAIRS, other=0.0).to(tl.float32)[None, :]
    if tl.program_id(1) == 0:
        _turn(q + row * q_row, q_head, q_out + row * (Q_HEADS * D), c, s,
              Q_HEADS, D, PAIRS, INTERLEAVED, WIDE, Q_BLOCK, PAIRS_BLOCK, REST_BLOCK)  # fmt: skip
    else:
        _turn(k + row * k_row, k_head, k_out + row * (K_HEADS * D), c, s,
              K_HEADS, D, PAIRS, INTERLEAVED, WIDE, K_BLOCK, PAIRS_BLOCK, REST_BLOCK)  # fmt: skip


@triton.jit
def _turn(
    x, x_head, out, c, s,
    HEADS: tl.constexpr, D: tl.constexpr, PAIRS: tl.constexpr, INTERLEAVED: tl.constexpr, WIDE: tl.constexpr,
    BLOCK: tl.constexpr, PAIRS_BLOCK: tl.constexpr, REST_BLOCK: tl.constexpr,
):  # fmt: skip
    """The heads of one row. Products are rounded before they are added, as elementwise kernels have it, unless WIDE."""
    head = tl.arange(0, BLOCK)[:, None]
    pair = tl.arange(0, PAIRS_BLOCK)[None, :]
    inside = (head < HEADS) & (pair < PAIRS)
    if INTERLEAVED:
        first = 2 * pair
        second = first + 1
    else:
        first = pair
        second = pair + PAIRS
    narrow = out.dtype.element_ty
    a = tl.load(x + head * x_head + first, mask=inside, other=0.0).to(tl.float32)
    b = tl.load(x + head * x_head + second, mask=inside, other=0.0).to(tl.float32)
    ac, bs, bc, as_ = a * c, b * s, b * c, a * s
    if not WIDE:
        ac, bs = ac.to(narrow).to(tl.float32), bs.to(narrow).to(tl.float32)
        bc, as_ = bc.to(narrow).to(tl.float32), as_.to(narrow).to(tl.float32)
    tl.store(out + head * D + first, (ac - bs).to(narrow), mask=inside)
    tl.store(out + head * D + second, (bc + as_).to(narrow), mask=inside)
    if D > 2 * PAIRS:
        rest = 2 * PAIRS + tl.arange(0, REST_BLOCK)[None, :]
        kept = (head < HEADS) & (rest < D)
        tl.store(out + head * D + rest, tl.load(x + head * x_head + rest, mask=kept), mask=kept)


@triton.jit
def gated(
    gate, gate_row, up, up_row, out,
    TANH: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """Programs (row, block): out (rows, WIDTH) = act(gate) * up, rounded between; GELU by tanh if TANH, else SiLU."""
    if OVERLAP:
        gdc_launch_dependents()
        gdc_wait()
    row = tl.program_id(0).to(tl.int64)
    dim = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = dim < WIDTH
    g = tl.load(gate + row * gate_row + dim, mask=inside, other=0.0).to(tl.float32)
    u = tl.load(up + row * up_row + dim, mask=inside, other=0.0).to(tl.float32)
    if TANH:
        inner = 0.7978845608028654 * (g + 0.044715 * g * g * g)
        activated = g * (1.0 - 1.0 / (tl.exp(2.0 * inner) + 1.0))  # x / 2 * (1 + tanh(inner))
    else:
        activated = g / (1.0 + tl.exp(-g))
    activated = activated.to(out.dtype.element_ty).to(tl.float32)
    tl.store(out + row * WIDTH + dim, (activated * u).to(out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["rows"])
def multiply(
    x, x_row, weight, weight_row, weight_dim, out, rows,
    WIDTH: tl.constexpr, COLUMNS: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_K: tl.constexpr,
    OVERLAP: tl.constexpr,
):  # fmt: skip
    """Programs (rows, columns): out (rows, COLUMNS) = x (rows, WIDTH) @ weight (COLUMNS, WIDTH).T, all of them fp32.

    A lane adds up its dims, every BLOCK_K-th, and the lanes are added in one order, whatever the number of rows.
    """
    if OVERLAP:
        gdc_launch_dependents()
        gdc_wait()
    row = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    column = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    total = tl.zeros((BLOCK_R, BLOCK_C, BLOCK_K), tl.float32)
    for first in range(0, WIDTH, BLOCK_K):
        dim = first + tl.arange(0, BLOCK_K)
        inside = (dim < WIDTH)[None, :]
        a = tl.load(x + row[:, None] * x_row + dim[None, :], mask=(row < rows)[:, None] & inside, other=0.0)
        at = weight + column[:, None] * weight_row + dim[None, :] * weight_dim
        w = tl.load(at, mask=(column < COLUMNS)[:, None] & inside, other=0.0)
        total += a[:, None, :] * w[None, :, :]
    live = (row < rows)[:, None] & (column < COLUMNS)[None, :]
    tl.store(out + row[:, None] * COLUMNS + column[None, :], tl.sum(total, 2), mask=live)
