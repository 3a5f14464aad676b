# mypy: ignore-errors
# ruff: noqa: SIM102 -- what is known when a kernel is compiled stands in an `if` of its own
"""From scores to a token.

greedy    argmax of the logits as they are; programs (row,): all that a step of greedy rows needs
scan      the likeliest of each block, and empty histograms for ``cutting``; programs (row, block)
draw      of each block the token of the largest share, and what top_p needs; programs (row, block)
finish    the row's token, remembered in its slot; programs (row,)
"""

from __future__ import annotations

import triton
import triton.language as tl

from engine.run.cuda.sampling.arithmetic import (
    FLOOR,
    LEAST,
    key_in,
    key_of,
    mass,
    random_words,
    ranked,
    score_of,
    token_in,
    waiting,
    weight,
)
from engine.run.cuda.sampling.state import (
    COLDNESS,
    FLAGS,
    INTEGERS,
    MIN_P,
    NUMBERS,
    PENALISES,
    SEED,
    TOP_K,
    TOP_P,
    raw_scores,
    scores,
    slot_of,
)

NO_NUMBER = tl.constexpr(0x7FFFFFFF)  # the key of NaN
NOTHING = tl.constexpr(-0x7F800001)  # the key of -inf
LOWEST = tl.constexpr(-(2**63))
SLACK = tl.constexpr(1e-4)  # relative, more than fp32 gets a bound wrong
COLDNESS_MAX = tl.constexpr(1e30)  # of fp32 bounds, which are then too large


@triton.jit
def greedy(
    logits, stride, draws, last, chosen,
    SLOTS: tl.constexpr, VOCABULARY: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    slot = slot_of(draws, row)
    if slot == SLOTS:
        return
    best = tl.full((BLOCK,), -(2**63), tl.int64)
    for first in range(0, VOCABULARY, BLOCK):
        tokens = first + tl.arange(0, BLOCK)
        x = raw_scores(logits, stride, row, tokens, VOCABULARY)
        best = tl.maximum(best, ranked(key_of(x), tokens))
    rank = tl.max(best, 0)
    key = key_in(rank)
    token = tl.where((key == NO_NUMBER) | (key == NOTHING), -1, token_in(rank))
    tl.store(last + slot, token)
    tl.store(chosen + row, token)


@triton.jit
def scan(
    logits, stride, draws, integers, shaped, tops, histograms, rows,
    SLOTS: tl.constexpr, VOCABULARY: tl.constexpr, BLOCK: tl.constexpr, BLOCKS: tl.constexpr,
    ROUNDS: tl.constexpr, SHAPED: tl.constexpr,
):  # fmt: skip
    """``tops`` (rows, BLOCKS) int64: the block's largest ``ranked``."""
    row, block = tl.program_id(0), tl.program_id(1)
    slot = slot_of(draws, row)
    if slot == SLOTS:
        return
    tokens = block * BLOCK + tl.arange(0, BLOCK)
    x = scores(logits, stride, shaped, draws, integers, row, slot, tokens, VOCABULARY, SHAPED)
    tl.store(tops + row * BLOCKS + block, tl.max(ranked(key_of(x), tokens), 0))
    if ROUNDS > 0:
        if block == 0:
            digit = tl.arange(0, 256)
            for turn in tl.static_range(ROUNDS):
                tl.store(histograms + (turn * rows + row) * 256 + digit, tl.zeros_like(digit))


@triton.jit
def row_top(tops, row, BLOCKS: tl.constexpr, PARTS: tl.constexpr):
    """The largest ``ranked`` of a row."""
    part = tl.arange(0, PARTS)
    return tl.max(tl.load(tops + row * BLOCKS + part, mask=part < BLOCKS, other=-(2**63)), 0)


@triton.jit
def weights_above(x, tokens, top, floor, coldness, VOCABULARY: tl.constexpr):
    """Weights (fp64) of a block's scores, and which of them count: those of at least the key ``floor``."""
    below = x.to(tl.float64) - score_of(top).to(tl.float64)
    z = below * coldness
    counts = (z > FLOOR) & (key_of(x) >= floor) & (tokens < VOCABULARY)
    return weight(tl.where(counts, z, 0.0)), counts


@triton.jit
def exact_share(x, top, coldness, min_p, word):
    """The share (fp64) of one score, -1 if it cannot be drawn."""
    z = (x.to(tl.float64) - score_of(top).to(tl.float64)) * coldness
    counts = z > FLOOR
    weights = weight(tl.where(counts, z, 0.0))
    return tl.where(counts & (weights >= min_p), weights / waiting(word), -1.0)


@triton.jit
def best_share(
    x, tokens, top, floor, coldness, min_p, seed, position, first, VOCABULARY: tl.constexpr, BLOCK: tl.constexpr
):
    """The largest share (fp64, -1 if there is none) of a block's scores of at least the key ``floor``, and its token.

    A share is at most weight / (1 - u), since -ln(u) is at least 1 - u: in fp32 that says which few may be the largest.
    Of equals it is the lowest token.
    """
    words = random_words(seed, position, first, BLOCK)
    cold = tl.minimum(coldness, COLDNESS_MAX).to(tl.float32)
    below = (x - score_of(top)) * cold
    weights = tl.exp(below)
    key = key_of(x)
    counts = (below > FLOOR - 1.0) & (weights >= min_p.to(tl.float32) * (1.0 - SLACK)) & (key >= floor)
    rest = (words ^ 0xFFFFFFFF).to(tl.float32) + 0.5
    bounds = tl.where(counts & (tokens < VOCABULARY), weights / rest, 0.0)
    ranks = ranked(bounds.to(tl.int32, bitcast=True), tokens)
    facts = (key.to(tl.int64) << 32) | words.to(tl.int64)
    best = tl.full((), -1.0, tl.float64)
    token = tl.full((), 0x7FFFFFFF, tl.int32)
    rank = tl.max(ranks, 0)
    while may_win(rank, best):
        chosen = token_in(rank)
        fact = tl.max(tl.where(tokens == chosen, facts, LOWEST), 0)
        share = exact_share(score_of(key_in(fact)), top, coldness, min_p, (fact & 0xFFFFFFFF).to(tl.uint32))
        better = (share > best) | ((share == best) & (chosen < token))
        token = tl.where(better, chosen, token)
        best = tl.maximum(share, best)
        ranks = tl.where(tokens == chosen, LOWEST, ranks)
        rank = tl.max(ranks, 0)
    return best, token


@triton.jit
def may_win(rank, best):
    """Whether the token of a bound may have a larger share than the best so far, or the same."""
    bits = key_in(rank)
    bound = tl.where(bits > 0, bits, 0).to(tl.float32, bitcast=True).to(tl.float64) * (4294967296.0 * (1.0 + SLACK))
    return (bits > 0) & (bound >= best)


@triton.jit
def winner(shares, candidates, row, BLOCKS: tl.constexpr, PARTS: tl.constexpr):
    """The token of a row's largest share."""
    part = tl.arange(0, PARTS)
    share = tl.load(shares + row * BLOCKS + part, mask=part < BLOCKS, other=-1.0)
    token = tl.load(candidates + row * BLOCKS + part, mask=part < BLOCKS, other=0x7FFFFFFF)
    return tl.min(tl.where(share == tl.max(share, 0), token, 0x7FFFFFFF), 0)


@triton.jit
def draw(
    logits, stride, draws, integers, numbers, shaped, tops, floors, shares, candidates, totals, settled,
    SLOTS: tl.constexpr, VOCABULARY: tl.constexpr, BLOCK: tl.constexpr, BLOCKS: tl.constexpr, PARTS: tl.constexpr,
    SHAPED: tl.constexpr, TOP_K_ROWS: tl.constexpr, TOP_P_ROWS: tl.constexpr,
):  # fmt: skip
    """``shares`` fp64, ``candidates`` int32, ``totals`` int64: (rows, BLOCKS); ``floors`` (rows,): of ``cutting``."""
    row, block = tl.program_id(0), tl.program_id(1)
    slot = slot_of(draws, row)
    if slot == SLOTS:
        return
    coldness = tl.load(numbers + slot * NUMBERS + COLDNESS)
    if coldness == 0.0:
        return
    top = key_in(row_top(tops, row, BLOCKS, PARTS))
    if (top == NO_NUMBER) | (top == NOTHING):
        return
    floor = tl.full((), LEAST, tl.int32)
    if TOP_K_ROWS:
        if tl.load(integers + slot * INTEGERS + TOP_K) > 0:
            floor = tl.load(floors + row)
    tokens = block * BLOCK + tl.arange(0, BLOCK)
    x = scores(logits, stride, shaped, draws, integers, row, slot, tokens, VOCABULARY, SHAPED)
    if TOP_P_ROWS:
        if tl.load(numbers + slot * NUMBERS + TOP_P) < 1.0:
            weights, counts = weights_above(x, tokens, top, floor, coldness, VOCABULARY)
            tl.store(totals + row * BLOCKS + block, tl.sum(tl.where(counts, mass(weights), 0), 0))
            tl.store(settled + row, 0)
    min_p = tl.load(numbers + slot * NUMBERS + MIN_P)
    seed = tl.load(integers + slot * INTEGERS + SEED)
    position = tl.load(draws + row * 3 + 2)
    share, token = best_share(
        x, tokens, top, floor, coldness, min_p, seed, position, block * BLOCK, VOCABULARY, BLOCK
    )  # fmt: skip
    tl.store(shares + row * BLOCKS + block, share)
    tl.store(candidates + row * BLOCKS + block, token)


@triton.jit
def finish(
    draws, integers, numbers, tops, shares, candidates, winners, counts, last, chosen,
    SLOTS: tl.constexpr, VOCABULARY: tl.constexpr, BLOCKS: tl.constexpr, PARTS: tl.constexpr,
    SAMPLED: tl.constexpr, TOP_P_ROWS: tl.constexpr, SHAPED: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    slot = slot_of(draws, row)
    if slot == SLOTS:
        return
    rank = row_top(tops, row, BLOCKS, PARTS)
    key = key_in(rank)
    token = token_in(rank)
    if (key == NO_NUMBER) | (key == NOTHING):
        token = tl.full((), -1, tl.int32)
    else:
        if SAMPLED:
            if tl.load(numbers + slot * NUMBERS + COLDNESS) != 0.0:
                token = winner(shares, candidates, row, BLOCKS, PARTS)
                if TOP_P_ROWS:
                    if tl.load(numbers + slot * NUMBERS + TOP_P) < 1.0:
                        token = tl.load(winners + row)
    tl.store(last + slot, token)
    tl.store(chosen + row, token)
    if SHAPED:
        if ((tl.load(integers + slot * INTEGERS + FLAGS) & PENALISES) != 0) & (token >= 0):
            at = counts + slot * VOCABULARY + token
            tl.store(at, tl.load(at) + 1)
