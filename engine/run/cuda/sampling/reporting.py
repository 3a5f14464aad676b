# mypy: ignore-errors
"""Log-probabilities of the model's own distribution: of the token drawn, and of the likeliest.

survey    of each block the likeliest tokens, in order; programs (row, block)
add_up    of each block the mass; programs (row, block)
report    (rows, 1 + 2 TOP_MAX) fp64: the drawn token's, then tokens, then theirs; programs (row,)
"""

from __future__ import annotations

import triton
import triton.language as tl

from engine.run.cuda.sampling.arithmetic import FLOOR, key_in, key_of, ln, mass, ranked, score_of, token_in, weight
from engine.run.cuda.sampling.state import INTEGERS, REPORT, raw_scores, slot_of

TOP_MAX = tl.constexpr(20)
LOWEST = tl.constexpr(-(2**63))


@triton.jit
def survey(
    logits, stride, draws, integers, likeliest,
    SLOTS: tl.constexpr, VOCABULARY: tl.constexpr, BLOCK: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    """``likeliest`` (rows, TOP_MAX, BLOCKS) int64: ``ranked``, the largest first; as many as are asked for, or one."""
    row, block = tl.program_id(0), tl.program_id(1)
    slot = slot_of(draws, row)
    if slot == SLOTS:
        return
    asked = tl.load(integers + slot * INTEGERS + REPORT).to(tl.int32)
    if asked == 0:
        return
    tokens = block * BLOCK + tl.arange(0, BLOCK)
    x = raw_scores(logits, stride, row, tokens, VOCABULARY)
    rank = tl.where(tokens < VOCABULARY, ranked(key_of(x), tokens), LOWEST)
    for place in range(0, tl.maximum(asked - 1, 1)):
        best = tl.max(rank, 0)
        tl.store(likeliest + (row * TOP_MAX + place) * BLOCKS + block, best)
        rank = tl.where(rank == best, LOWEST, rank)


@triton.jit
def add_up(
    logits, stride, draws, integers, likeliest, raw_masses,
    SLOTS: tl.constexpr, VOCABULARY: tl.constexpr, BLOCK: tl.constexpr, BLOCKS: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """``raw_masses`` (rows, BLOCKS) int64."""
    row, block = tl.program_id(0), tl.program_id(1)
    slot = slot_of(draws, row)
    if slot == SLOTS:
        return
    if tl.load(integers + slot * INTEGERS + REPORT) == 0:
        return
    part = tl.arange(0, PARTS)
    first = tl.load(likeliest + row * TOP_MAX * BLOCKS + part, mask=part < BLOCKS, other=LOWEST)
    top = score_of(key_in(tl.max(first, 0))).to(tl.float64)
    tokens = block * BLOCK + tl.arange(0, BLOCK)
    z = raw_scores(logits, stride, row, tokens, VOCABULARY).to(tl.float64) - top
    counts = z > FLOOR
    total = tl.sum(tl.where(counts, mass(weight(tl.where(counts, z, 0.0))), 0), 0)
    tl.store(raw_masses + row * BLOCKS + block, total)


@triton.jit
def report(
    logits, stride, draws, integers, likeliest, raw_masses, chosen, reports,
    SLOTS: tl.constexpr, VOCABULARY: tl.constexpr, BLOCKS: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    slot = slot_of(draws, row)
    if slot == SLOTS:
        return
    asked = tl.load(integers + slot * INTEGERS + REPORT).to(tl.int32)
    token = tl.load(chosen + row)
    if (asked == 0) | (token < 0):
        return
    part = tl.arange(0, PARTS)
    at = likeliest + row * TOP_MAX * BLOCKS + part
    rank = tl.load(at, mask=part < BLOCKS, other=LOWEST)
    top = score_of(key_in(tl.max(rank, 0))).to(tl.float64)
    total = tl.sum(tl.load(raw_masses + row * BLOCKS + part, mask=part < BLOCKS, other=0), 0)
    whole = ln(total.to(tl.float64) * 9.094947017729282379150390625e-13)
    into = reports + row * (1 + 2 * TOP_MAX)
    drawn = score_of(key_of(raw_scores(logits, stride, row, token, VOCABULARY)))  # -0 as 0
    tl.store(into, drawn.to(tl.float64) - top - whole)
    turn = tl.zeros_like(part)  # how many of each block have been taken
    for place in range(0, asked - 1):
        best = tl.max(rank, 0)
        tl.store(into + 1 + place, token_in(best).to(tl.float64))
        tl.store(into + 1 + TOP_MAX + place, score_of(key_in(best)).to(tl.float64) - top - whole)
        turn += (rank == best).to(tl.int32)
        more = (part < BLOCKS) & (turn < asked - 1)
        rank = tl.load(at + turn * BLOCKS, mask=more, other=LOWEST)
