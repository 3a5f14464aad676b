# mypy: ignore-errors
"""What stands between the matrix products of a decoder layer, in Triton.

    embed        token ids (or tokens that were drawn, on the device) -> residual stream
    add_norm     residual += delta; RMSNorm of it
    heads        q/k norm, keys turned to their position, keys and values into the pool; queries stay raw, or turned
    gate         silu(gate) * up
    gather       of the rows that draw a token, what the rest of the last layer needs
    fold         two partial attention results into one

Sums and rotations are fp32; rounding to the model's dtype happens where transformers rounds. Each program writes
rows that no other one writes, and a row's result does not depend on other rows. Where a kernel writes what it has read,
a barrier stands between: narrow rows are read by several warps each. Importing this needs Triton.

``OVERLAP``: programmatic dependent launch. A kernel lets the next one start at once, and waits for the one before it
ahead of its first access to memory.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait


@triton.jit
def embed(source, last, table, out, WIDTH: tl.constexpr, BLOCK: tl.constexpr, OVERLAP: tl.constexpr):
    """out[row] = table[source[row]], or table[last[~source[row]]] where source is negative.

    A slot whose last draw found no number to choose by holds -1, and is embedded as token 0.
    """
    if OVERLAP:
        gdc_launch_dependents()
        gdc_wait()
    row = tl.program_id(0)
    token = tl.load(source + row).to(tl.int64)
    if token < 0:
        token = tl.maximum(tl.load(last + (-1 - token)).to(tl.int64), 0)
    dim = tl.arange(0, BLOCK)
    inside = dim < WIDTH
    tl.store(out + row.to(tl.int64) * WIDTH + dim, tl.load(table + token * WIDTH + dim, mask=inside), mask=inside)


@triton.jit
def add_norm(
    residual, delta, weight, out, eps,
    ADD: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """residual[row] += delta[row] if ADD, then out[row] = RMSNorm(residual[row]) * weight."""
    if OVERLAP:
        gdc_launch_dependents()
        gdc_wait()
    row = tl.program_id(0).to(tl.int64) * WIDTH
    dim = tl.arange(0, BLOCK)
    inside = dim < WIDTH
    x = tl.load(residual + row + dim, mask=inside, other=0.0)
    if ADD:
        x = (x.to(tl.float32) + tl.load(delta + row + dim, mask=inside, other=0.0).to(tl.float32)).to(x.dtype)
        tl.debug_barrier()
        tl.store(residual + row + dim, x, mask=inside)
    wide = x.to(tl.float32)
    scale = tl.rsqrt(tl.sum(wide * wide, 0) / WIDTH + eps)
    w = tl.load(weight + dim, mask=inside, other=0.0)
    normed = (wide * scale).to(x.dtype).to(tl.float32) * w.to(tl.float32)
    tl.store(out + row + dim, normed.to(x.dtype), mask=inside)


@triton.jit
def heads(
    qkv, q_weight, k_weight, cos, sin, positions, slots, keys, values, turned, eps,
    NORM: tl.constexpr, TURN: tl.constexpr, HEADS: tl.constexpr, KV_HEADS: tl.constexpr, D: tl.constexpr,
    GROUP: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """Programs (row, GROUP heads). Queries are normed in place, and turned into ``turned`` if TURN.

    qkv (rows, HEADS + 2 KV_HEADS, D); keys, values (slots, KV_HEADS, D); cos, sin fp32 (positions, D / 2).
    """
    if OVERLAP:
        gdc_launch_dependents()
        gdc_wait()
    row = tl.program_id(0).to(tl.int64)
    first = tl.program_id(1) * GROUP
    HALF: tl.constexpr = D // 2
    head = first + tl.arange(0, GROUP)
    dim = tl.arange(0, D)
    half = tl.arange(0, HALF)
    at = qkv + row * ((HEADS + 2 * KV_HEADS) * D)
    slot = tl.load(slots + row).to(tl.int64) * (KV_HEADS * D)
    if first >= HEADS + KV_HEADS:
        v = tl.load(at + head[:, None] * D + dim[None, :])
        tl.store(values + slot + (head - HEADS - KV_HEADS)[:, None] * D + dim[None, :], v)
    else:
        lower = at + head[:, None] * D + half[None, :]
        a = tl.load(lower)
        b = tl.load(lower + HALF)
        weight = q_weight
        if first >= HEADS:
            weight = k_weight
        if NORM:
            wide_a, wide_b = a.to(tl.float32), b.to(tl.float32)
            scale = tl.rsqrt((tl.sum(wide_a * wide_a, 1) + tl.sum(wide_b * wide_b, 1)) / D + eps)[:, None]
            w_a = tl.load(weight + half).to(tl.float32)[None, :]
            w_b = tl.load(weight + HALF + half).to(tl.float32)[None, :]
            a = ((wide_a * scale).to(a.dtype).to(tl.float32) * w_a).to(a.dtype)
            b = ((wide_b * scale).to(b.dtype).to(tl.float32) * w_b).to(b.dtype)
        angle = tl.load(positions + row).to(tl.int64) * HALF
        c = tl.load(cos + angle + half)[None, :]
        s = tl.load(sin + angle + half)[None, :]
        turned_a = (a.to(tl.float32) * c - b.to(tl.float32) * s).to(a.dtype)
        turned_b = (b.to(tl.float32) * c + a.to(tl.float32) * s).to(a.dtype)
        if first >= HEADS:
            into = keys + slot + (head - HEADS)[:, None] * D + half[None, :]
            tl.store(into, turned_a)
            tl.store(into + HALF, turned_b)
        else:
            if NORM:
                tl.debug_barrier()
                tl.store(lower, a)
                tl.store(lower + HALF, b)
            if TURN:
                into = turned + row * (HEADS * D) + head[:, None] * D + half[None, :]
                tl.store(into, turned_a)
                tl.store(into + HALF, turned_b)


@triton.jit
def gate(both, out, WIDTH: tl.constexpr, BLOCK: tl.constexpr, OVERLAP: tl.constexpr):
    """Programs (row, block): both (rows, gate WIDTH | up WIDTH) -> out (rows, WIDTH)."""
    if OVERLAP:
        gdc_launch_dependents()
        gdc_wait()
    row = tl.program_id(0).to(tl.int64)
    dim = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = dim < WIDTH
    g = tl.load(both + row * (2 * WIDTH) + dim, mask=inside, other=0.0)
    u = tl.load(both + row * (2 * WIDTH) + WIDTH + dim, mask=inside, other=0.0)
    wide = g.to(tl.float32)
    activated = (wide / (1.0 + tl.exp(-wide))).to(g.dtype)
    tl.store(out + row * WIDTH + dim, (activated.to(tl.float32) * u.to(tl.float32)).to(g.dtype), mask=inside)


@triton.jit
def gather(
    rows, residual, attended, drawn_residual, drawn_attended,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr, HEADS_WIDTH: tl.constexpr, HEADS_BLOCK: tl.constexpr,
    OVERLAP: tl.constexpr,
):  # fmt: skip
    """Programs (draw,): row ``rows[draw]`` of residual and attended becomes row ``draw`` of what is drawn from."""
    if OVERLAP:
        gdc_launch_dependents()
        gdc_wait()
    draw = tl.program_id(0).to(tl.int64)
    row = tl.load(rows + draw).to(tl.int64)
    dim = tl.arange(0, BLOCK)
    x = tl.load(residual + row * WIDTH + dim, mask=dim < WIDTH)
    tl.store(drawn_residual + draw * WIDTH + dim, x, mask=dim < WIDTH)
    wide = tl.arange(0, HEADS_BLOCK)
    y = tl.load(attended + row * HEADS_WIDTH + wide, mask=wide < HEADS_WIDTH)
    tl.store(drawn_attended + draw * HEADS_WIDTH + wide, y, mask=wide < HEADS_WIDTH)


@triton.jit
def fold(
    a, a_lse, b, b_lse, out, out_lse, rows,
    HEADS: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr, GROUP: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """Programs (row, GROUP heads): two partial results (rows, HEADS, D) with natural lse (HEADS, rows) into one.

    Nothing is folded in place: each warp of a program reads its heads' lse for itself, one perhaps after another
    has written. Both lse are finite.
    """
    if OVERLAP:
        gdc_launch_dependents()
        gdc_wait()
    row = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * GROUP + tl.arange(0, GROUP)
    dim = tl.arange(0, BLOCK)
    inside = (head >= 0)[:, None] & (dim < D)[None, :]
    at = row * (HEADS * D) + head[:, None] * D + dim[None, :]
    lse_at = head.to(tl.int64) * rows + row
    x, y = tl.load(a_lse + lse_at), tl.load(b_lse + lse_at)
    top = tl.maximum(x, y)
    wx, wy = tl.exp(x - top), tl.exp(y - top)
    total = wx + wy
    wide_a = tl.load(a + at, mask=inside, other=0.0).to(tl.float32)
    wide_b = tl.load(b + at, mask=inside, other=0.0).to(tl.float32)
    merged = (wide_a * wx[:, None] + wide_b * wy[:, None]) / total[:, None]
    tl.store(out + at, merged.to(out.dtype.element_ty), mask=inside)
    tl.store(out_lse + lse_at, top + tl.log(total))
