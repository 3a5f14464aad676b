# mypy: ignore-errors
"""The products of experts, grouped: tiles of (an expert's features) x (rows that went to it), weights on the long side.

    gate_up    silu(gate @ x) * (up @ x) of each pair, at the pair's place in the order by expert
    narrow     the same for few pairs: half as many features a program, of gate and up in one tile
    down       down @ that, at the pair
    combine    a row's ``TOP`` results, each times its share, added in ascending order of experts in fp32
    arrive     the same, added to the residual stream, and RMSNorm of it: combine and then ``kernels.add_norm``

Features stand where the matrix instructions want 64 rows or more, a pair is a column: so every width of tile, 8 pairs
or 128, is the same kind of instruction on Hopper, and a result is summed along K in one order, sixteen at a time into
one accumulator. A pair's results depend on its row and its expert alone; ``engine.check.expert_rows`` measures it.

How many tiles there are is read from ``starts``: programs beyond them end at once. Results are rounded where
transformers' grouped implementation rounds. Importing this needs Triton. ``OVERLAP``: see ``engine.run.cuda.kernels``.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait


@triton.jit
def _tile_of(starts, number, EXPERTS: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_N: tl.constexpr):
    """Of tile ``number``: its expert (EXPERTS or more: there is no such tile), first place, and how many places."""
    expert = tl.arange(0, BLOCK_E)
    known = expert < EXPERTS
    start = tl.load(starts + expert, mask=known, other=0)
    count = tl.load(starts + expert + 1, mask=known, other=0) - start
    tiles = tl.cdiv(count, BLOCK_N)
    end = tl.cumsum(tiles, 0)
    found = tl.sum((end <= number).to(tl.int32), 0)
    mine = expert == found
    within = (number - tl.sum(tl.where(mine, end - tiles, 0), 0)) * BLOCK_N
    first = tl.sum(tl.where(mine, start, 0), 0) + within
    return found, first, tl.sum(tl.where(mine, count, 0), 0) - within


@triton.jit
def _inputs_of(x, order, first, live, place, WIDTH: tl.constexpr, TOP: tl.constexpr):
    """Where the row of each of a tile's pairs begins, (BLOCK_N, 1)."""
    pair = tl.load(order + first + place, mask=place < live, other=0)
    return x + (pair // TOP).to(tl.int64)[:, None] * WIDTH


@triton.jit
def _store_inner(out, gates, ups, first, live, place, feature, INNER: tl.constexpr, BLOCK_M: tl.constexpr):
    """silu(gates) * ups of a tile, all rounded, by place."""
    rounded = out.dtype.element_ty
    wide = gates.to(rounded).to(tl.float32)
    activated = (wide / (1.0 + tl.exp(-wide))).to(rounded).to(tl.float32)
    product = (activated * ups.to(rounded).to(tl.float32)).to(rounded)
    dim = feature + tl.arange(0, BLOCK_M)
    into = out + (first + place).to(tl.int64)[None, :] * INNER + dim[:, None]
    tl.store(into, product, mask=(dim < INNER)[:, None] & (place < live)[None, :])


@triton.jit
def gate_up(
    x, weights, order, starts, out,
    WIDTH: tl.constexpr, INNER: tl.constexpr, TOP: tl.constexpr, EXPERTS: tl.constexpr, BLOCK_E: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, STAGES: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """Programs (BLOCK_M of the inner features, tile). x (rows, WIDTH), out (pairs, INNER) by place.

    weights: descriptor of (EXPERTS * 2 * INNER, WIDTH), blocks of (BLOCK_M, BLOCK_K); each expert's gate, then its up.
    """
    if OVERLAP:
        gdc_launch_dependents()
        gdc_wait()
    expert, first, live = _tile_of(starts, tl.program_id(1), EXPERTS, BLOCK_E, BLOCK_N)
    if expert >= EXPERTS:
        return
    place = tl.arange(0, BLOCK_N)
    at_x = _inputs_of(x, order, first, live, place, WIDTH, TOP)
    feature = tl.program_id(0) * BLOCK_M
    at_w = expert * (2 * INNER) + feature
    gates = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    ups = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for k in tl.range(0, WIDTH, BLOCK_K, num_stages=STAGES):
        dim = k + tl.arange(0, BLOCK_K)
        here = (place < live)[:, None]
        if WIDTH % BLOCK_K != 0:
            here = here & (dim < WIDTH)[None, :]
        a = tl.load(at_x + dim[None, :], mask=here, other=0.0)
        gates = tl.dot(weights.load([at_w, k]), tl.trans(a), gates)
        ups = tl.dot(weights.load([at_w + INNER, k]), tl.trans(a), ups)
    _store_inner(out, gates, ups, first, live, place, feature, INNER, BLOCK_M)


@triton.jit
def narrow(
    x, weights, order, starts, out,
    WIDTH: tl.constexpr, INNER: tl.constexpr, TOP: tl.constexpr, EXPERTS: tl.constexpr, BLOCK_E: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, STAGES: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """As ``gate_up``, but weights (EXPERTS * 2 * INNER, WIDTH) are read by their addresses, BLOCK_M of each half."""
    if OVERLAP:
        gdc_launch_dependents()
        gdc_wait()
    expert, first, live = _tile_of(starts, tl.program_id(1), EXPERTS, BLOCK_E, BLOCK_N)
    if expert >= EXPERTS:
        return
    place = tl.arange(0, BLOCK_N)
    at_x = _inputs_of(x, order, first, live, place, WIDTH, TOP)
    both = tl.arange(0, 2 * BLOCK_M)
    feature = tl.program_id(0) * BLOCK_M
    known = feature + both % BLOCK_M < INNER
    at_w = (
        weights
        + (expert * (2 * INNER) + feature + both % BLOCK_M + both // BLOCK_M * INNER).to(tl.int64)[:, None] * WIDTH
    )
    total = tl.zeros((2 * BLOCK_M, BLOCK_N), tl.float32)
    for k in tl.range(0, WIDTH, BLOCK_K, num_stages=STAGES):
        dim = k + tl.arange(0, BLOCK_K)
        inside = (dim < WIDTH)[None, :]
        w = tl.load(at_w + dim[None, :], mask=known[:, None] & inside, other=0.0)
        a = tl.load(at_x + dim[None, :], mask=(place < live)[:, None] & inside, other=0.0)
        total = tl.dot(w, tl.trans(a), total)
    rounded = total.to(out.dtype.element_ty)
    gates, ups = tl.split(tl.permute(tl.reshape(rounded, (2, BLOCK_M, BLOCK_N)), (1, 2, 0)))
    _store_inner(out, gates, ups, first, live, place, feature, INNER, BLOCK_M)


@triton.jit
def down_tile(
    inner, weights, expert, feature, first,
    WIDTH: tl.constexpr, INNER: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """The sums of a tile of the second product, (BLOCK_M, BLOCK_N) fp32: an expert's features from ``feature`` on."""
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for k in tl.range(0, INNER, BLOCK_K, num_stages=STAGES):
        total = tl.dot(weights.load([expert * WIDTH + feature, k]), tl.trans(inner.load([first, k])), total)
    return total


@triton.jit
def store_by_pair(out, total, order, first, live, place, feature, WIDTH: tl.constexpr, BLOCK_M: tl.constexpr):
    """Writes a tile's sums, rounded, to their pairs."""
    pair = tl.load(order + first + place, mask=place < live, other=0)
    dim = feature + tl.arange(0, BLOCK_M)
    into = out + pair.to(tl.int64)[None, :] * WIDTH + dim[:, None]
    tl.store(into, total.to(out.dtype.element_ty), mask=(dim < WIDTH)[:, None] & (place < live)[None, :])


@triton.jit
def down(
    inner, weights, order, starts, out,
    WIDTH: tl.constexpr, INNER: tl.constexpr, EXPERTS: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, STAGES: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """Programs (BLOCK_M of the hidden width, tile). out (pairs, WIDTH) by pair.

    inner: descriptor of (pairs, INNER) by place, blocks of (BLOCK_N, BLOCK_K). weights: descriptor of
    (EXPERTS * WIDTH, INNER), blocks of (BLOCK_M, BLOCK_K).
    """
    if OVERLAP:
        gdc_launch_dependents()
        gdc_wait()
    expert, first, live = _tile_of(starts, tl.program_id(1), EXPERTS, BLOCK_E, BLOCK_N)
    if expert >= EXPERTS:
        return
    feature = tl.program_id(0) * BLOCK_M
    total = down_tile(inner, weights, expert, feature, first, WIDTH, INNER, BLOCK_M, BLOCK_N, BLOCK_K, STAGES)
    store_by_pair(out, total, order, first, live, tl.arange(0, BLOCK_N), feature, WIDTH, BLOCK_M)


@triton.jit
def _added(results, shares, row, dim, WIDTH: tl.constexpr, TOP: tl.constexpr, ROUNDED: tl.constexpr):
    """A row's results at ``dim`` times their shares, added; fp32."""
    total = tl.zeros_like(dim).to(tl.float32)
    for slot in tl.static_range(TOP):
        pair = row * TOP + slot
        one = tl.load(results + pair * WIDTH + dim, mask=dim < WIDTH, other=0.0).to(tl.float32)
        one = one * tl.load(shares + pair)
        if ROUNDED:
            one = one.to(results.dtype.element_ty).to(tl.float32)
        total += one
    return total


@triton.jit
def combine(
    results, shares, out,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr, TOP: tl.constexpr, ROUNDED: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """Programs (row, block): results (rows * TOP, WIDTH) by pair, shares fp32 (rows * TOP) -> out (rows, WIDTH).

    ROUNDED: shares have the model's dtype, so each product with one is rounded to it, too.
    """
    if OVERLAP:
        gdc_launch_dependents()
        gdc_wait()
    row = tl.program_id(0).to(tl.int64)
    dim = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    total = _added(results, shares, row, dim, WIDTH, TOP, ROUNDED)
    tl.store(out + row * WIDTH + dim, total.to(out.dtype.element_ty), mask=dim < WIDTH)


@triton.jit
def arrive(
    results, shares, residual, weight, out, eps,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr, TOP: tl.constexpr, ROUNDED: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """Programs (row,): residual[row] += what ``combine`` gives, then out[row] = RMSNorm(residual[row]) * weight."""
    if OVERLAP:
        gdc_launch_dependents()
        gdc_wait()
    row = tl.program_id(0).to(tl.int64)
    dim = tl.arange(0, BLOCK)
    inside = dim < WIDTH
    at = residual + row * WIDTH + dim
    x = tl.load(at, mask=inside, other=0.0)
    delta = _added(results, shares, row, dim, WIDTH, TOP, ROUNDED).to(x.dtype)
    x = (x.to(tl.float32) + delta.to(tl.float32)).to(x.dtype)
    tl.debug_barrier()
    tl.store(at, x, mask=inside)
    wide = x.to(tl.float32)
    scale = tl.rsqrt(tl.sum(wide * wide, 0) / WIDTH + eps)
    normed = (wide * scale).to(x.dtype).to(tl.float32) * tl.load(weight + dim, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + row * WIDTH + dim, normed.to(x.dtype), mask=inside)
