# mypy: ignore-errors
"""The second product of experts for long pieces, many pairs an expert: persistent programs over a list of tiles.

    list_tiles   which tiles there are, by expert: (expert, first place, how many places), their number first
    down_long    as ``products.down``

Its sums are short, so that beginning and end of a tile of a program of its own would show. A program goes
from tile to tile in one loop: what the next one reads is under way while the last one is written. (The first product is
faster tile by tile: persistent, 903 us a layer of Qwen3-30B-A3B at 8192 rows against 809 on an H200.)
Importing this needs Triton. ``OVERLAP``: see ``engine.run.cuda.kernels``.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from engine.run.cuda.experts import layer
from engine.run.cuda.experts.products import down_tile, store_by_pair

RECORD = tl.constexpr(layer.TILE_RECORD)


@triton.jit
def list_tiles(
    starts, tiles, EXPERTS: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_N: tl.constexpr, OVERLAP: tl.constexpr
):
    """Programs (expert,). tiles int32 (1 + tiles, RECORD): a record of their number, then one each."""
    if OVERLAP:
        gdc_launch_dependents()
        gdc_wait()
    mine = tl.program_id(0)
    expert = tl.arange(0, BLOCK_E)
    known = expert < EXPERTS
    start = tl.load(starts + expert, mask=known, other=0)
    count = tl.load(starts + expert + 1, mask=known, other=0) - start
    needed = tl.cdiv(count, BLOCK_N)
    before = tl.sum(tl.where(expert < mine, needed, 0), 0)
    first = tl.sum(tl.where(expert == mine, start, 0), 0)
    left = tl.sum(tl.where(expert == mine, count, 0), 0)
    if mine == 0:
        tl.store(tiles, tl.sum(needed, 0))
    at = tiles + (1 + before) * RECORD
    while left > 0:
        tl.store(at, mine)
        tl.store(at + 1, first)
        tl.store(at + 2, tl.minimum(left, BLOCK_N))
        at += RECORD
        first += BLOCK_N
        left -= BLOCK_N


@triton.jit
def down_long(
    inner, weights, order, tiles, out,
    WIDTH: tl.constexpr, INNER: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr, PROGRAMS: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """Programs (PROGRAMS,)."""
    if OVERLAP:
        gdc_launch_dependents()
        gdc_wait()
    SIDE: tl.constexpr = (WIDTH + BLOCK_M - 1) // BLOCK_M
    total = tl.load(tiles) * SIDE
    place = tl.arange(0, BLOCK_N)
    for number in tl.range(tl.program_id(0), total, PROGRAMS, flatten=True):
        tile = tiles + (1 + number // SIDE) * RECORD
        expert = tl.load(tile)
        first = tl.load(tile + 1)
        live = tl.load(tile + 2)
        feature = (number % SIDE) * BLOCK_M
        added = down_tile(inner, weights, expert, feature, first, WIDTH, INNER, BLOCK_M, BLOCK_N, BLOCK_K, STAGES)
        store_by_pair(out, added, order, first, live, place, feature, WIDTH, BLOCK_M)
