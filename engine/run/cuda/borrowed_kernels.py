# mypy: ignore-errors
"""What a borrowed model's captured forward has of ours beside attention, in Triton. Importing this needs Triton.

    norm         RMSNorm and the layer norms of modelling code, a row as it would be alone
    store        keys and values of the new tokens into the pool

Sums are fp32, in an order that follows from the width alone; rounding is where the module that is replaced rounds.
``OVERLAP``: see ``kernels``.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait


@triton.jit
def norm(
    x, x_stride, weight, out, rows, eps,
    WEIGHTS: tl.constexpr, CENTRED: tl.constexpr, ROUNDED: tl.constexpr, PLUS: tl.constexpr, WEIGHED: tl.constexpr,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """Programs of ROWS rows: out[row] = x[row] / rms(x[row]) * weight[row % WEIGHTS]; less its mean first if CENTRED.

    ROUNDED: to the dtype of x before the weight, else after it. The weight is PLUS + weight; none unless WEIGHED.
    """
    if OVERLAP:
        gdc_launch_dependents()
        gdc_wait()
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    dim = tl.arange(0, BLOCK)
    inside = (row < rows)[:, None] & (dim < WIDTH)[None, :]
    wide = tl.load(x + row[:, None] * x_stride + dim[None, :], mask=inside, other=0.0).to(tl.float32)
    if CENTRED:
        wide = tl.where(inside, wide - (tl.sum(wide, 1) / WIDTH)[:, None], 0.0)
    scale = tl.rsqrt(tl.sum(wide * wide, 1) / WIDTH + eps)
    normed = wide * scale[:, None]
    if ROUNDED:
        normed = normed.to(out.dtype.element_ty).to(tl.float32)
    if WEIGHED:
        at = (row % WEIGHTS)[:, None] * WIDTH + dim[None, :]
        normed *= PLUS + tl.load(weight + at, mask=inside, other=0.0).to(tl.float32)
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
