# mypy: ignore-errors
# ruff: noqa: SIM102 -- what is known when a kernel is compiled stands in an `if` of its own
"""top_k and top_p without a sort.

top_k: the key of the k-th largest score, eight bits at a time, by counting; programs (row, block) for each round.

top_p is asked of the token drawn, not of the vocabulary: the token of the largest share stays if the mass of all larger
scores is below top_p of the whole, and is then the one that a draw among the tokens kept would give. Otherwise neither
it nor anything of a smaller score is kept, and the next to ask is the token of the largest share among the larger
scores. Each time, the mass that is left is a random part of what it was: with top_p 0.95 one row in twenty asks twice.

    count    histogram of the next digit of the keys
    limit    the key of the k-th largest; programs (row,)
    judge    the mass above the token drawn
    again    if that is too much: the largest share above it
    settle   the rest of it, for a row that asks more often; programs (row,)
"""

from __future__ import annotations

import triton
import triton.language as tl

from engine.run.cuda.sampling.arithmetic import key_in, key_of, mass
from engine.run.cuda.sampling.drawing import NO_NUMBER, NOTHING, best_share, row_top, weights_above, winner
from engine.run.cuda.sampling.state import (
    COLDNESS,
    INTEGERS,
    MIN_P,
    NUMBERS,
    SEED,
    TOP_K,
    TOP_P,
    reshaped,
    scores,
    slot_of,
)


@triton.jit
def next_digit(histogram, left):
    """Which digit the k-th largest has, ``left`` of those counted being as large or larger, and how many it leaves."""
    digit = tl.arange(0, 256)
    count = tl.load(histogram + digit)
    larger = tl.sum(count, 0) - tl.cumsum(count, 0)
    chosen = tl.sum((larger >= left).to(tl.int32), 0)
    return chosen, left - tl.sum(tl.where(digit == chosen, larger, 0), 0)


@triton.jit
def digits_of(draws, integers, row, slot, DIGITS: tl.constexpr, SHAPED: tl.constexpr):
    """How many digits tell the scores of a row apart; the model's own have fewer than fp32."""
    digits = DIGITS
    if SHAPED:
        digits = tl.where(reshaped(draws, integers, row, slot), 4, DIGITS)
    return digits


@triton.jit
def prefix_of(histograms, prefixes, integers, row, rows, slot, TURN: tl.constexpr):
    """The first TURN digits of the k-th largest key, and which of those that share them it is."""
    left = tl.load(integers + slot * INTEGERS + TOP_K).to(tl.int32)
    prefix = tl.full((), 0, tl.int32)
    if TURN > 1:
        prefix = tl.load(prefixes + ((TURN - 2) * rows + row) * 2)
        left = tl.load(prefixes + ((TURN - 2) * rows + row) * 2 + 1)
    if TURN > 0:
        digit, left = next_digit(histograms + ((TURN - 1) * rows + row) * 256, left)
        prefix = (prefix << 8) | digit
    return prefix, left


@triton.jit
def count(
    logits, stride, draws, integers, numbers, shaped, histograms, prefixes, rows,
    SLOTS: tl.constexpr, VOCABULARY: tl.constexpr, BLOCK: tl.constexpr,
    TURN: tl.constexpr, DIGITS: tl.constexpr, SHAPED: tl.constexpr,
):  # fmt: skip
    """``histograms`` (4, rows, 256) int32; ``prefixes`` (4, rows, 2) int32: what ``prefix_of`` gives, kept."""
    row, block = tl.program_id(0), tl.program_id(1)
    slot = slot_of(draws, row)
    if slot == SLOTS:
        return
    if tl.load(integers + slot * INTEGERS + TOP_K) == 0:
        return
    if digits_of(draws, integers, row, slot, DIGITS, SHAPED) <= TURN:
        return
    prefix, left = prefix_of(histograms, prefixes, integers, row, rows, slot, TURN)
    if TURN > 0:
        if block == 0:
            tl.store(prefixes + ((TURN - 1) * rows + row) * 2, prefix)
            tl.store(prefixes + ((TURN - 1) * rows + row) * 2 + 1, left)
    tokens = block * BLOCK + tl.arange(0, BLOCK)
    x = scores(logits, stride, shaped, draws, integers, row, slot, tokens, VOCABULARY, SHAPED)
    ordered = key_of(x).to(tl.uint32, bitcast=True) ^ 0x80000000
    among = tokens < VOCABULARY
    if TURN > 0:
        among = among & ((ordered >> (32 - 8 * TURN)) == prefix.to(tl.uint32, bitcast=True))
    digit = ((ordered >> (24 - 8 * TURN)) & 0xFF).to(tl.int32)
    counted = tl.histogram(digit, 256, mask=among)
    into = histograms + (TURN * rows + row) * 256 + tl.arange(0, 256)
    tl.atomic_add(into, counted, mask=counted > 0, sem="relaxed")


@triton.jit
def limit(
    draws, integers, histograms, prefixes, floors, rows,
    SLOTS: tl.constexpr, DIGITS: tl.constexpr, SHAPED: tl.constexpr,
):  # fmt: skip
    """``floors`` (rows,) int32: the smallest key with the digits of the k-th largest."""
    row = tl.program_id(0)
    slot = slot_of(draws, row)
    if slot == SLOTS:
        return
    if tl.load(integers + slot * INTEGERS + TOP_K) == 0:
        return
    if digits_of(draws, integers, row, slot, DIGITS, SHAPED) == 4:
        prefix, _left = prefix_of(histograms, prefixes, integers, row, rows, slot, 4)
        floor = prefix
    else:
        prefix, _left = prefix_of(histograms, prefixes, integers, row, rows, slot, DIGITS)
        floor = prefix << (32 - 8 * DIGITS)
    tl.store(floors + row, floor ^ -0x80000000)


@triton.jit
def asks(draws, numbers, tops, settled, row, SLOTS: tl.constexpr, BLOCKS: tl.constexpr, PARTS: tl.constexpr):
    """Whether top_p of a row is still to be asked for."""
    slot = slot_of(draws, row)
    open_ = slot != SLOTS
    if open_:
        open_ = (tl.load(numbers + slot * NUMBERS + COLDNESS) != 0.0) & (
            tl.load(numbers + slot * NUMBERS + TOP_P) < 1.0
        )
        if open_:
            top = key_in(row_top(tops, row, BLOCKS, PARTS))
            open_ = (top != NO_NUMBER) & (top != NOTHING) & (tl.load(settled + row) == 0)
    return open_


@triton.jit
def sum_of(parts, row, BLOCKS: tl.constexpr, PARTS: tl.constexpr):
    part = tl.arange(0, PARTS)
    return tl.sum(tl.load(parts + row * BLOCKS + part, mask=part < BLOCKS, other=0), 0)


@triton.jit
def stays(above, totals, numbers, row, slot, BLOCKS: tl.constexpr, PARTS: tl.constexpr):
    """Whether a token below the mass ``above`` is kept by top_p."""
    total = sum_of(totals, row, BLOCKS, PARTS)
    return above.to(tl.float64) < tl.load(numbers + slot * NUMBERS + TOP_P) * total.to(tl.float64)


@triton.jit
def judge(
    logits, stride, draws, integers, numbers, shaped, tops, shares, candidates, masses, winners, settled,
    SLOTS: tl.constexpr, VOCABULARY: tl.constexpr, BLOCK: tl.constexpr, BLOCKS: tl.constexpr, PARTS: tl.constexpr,
    SHAPED: tl.constexpr,
):  # fmt: skip
    """``masses`` (rows, BLOCKS) int64: of scores above that of the row's token of the largest share, ``winners``."""
    row, block = tl.program_id(0), tl.program_id(1)
    if not asks(draws, numbers, tops, settled, row, SLOTS, BLOCKS, PARTS):
        return
    slot = slot_of(draws, row)
    token = winner(shares, candidates, row, BLOCKS, PARTS)
    top = key_in(row_top(tops, row, BLOCKS, PARTS))
    least = key_of(scores(logits, stride, shaped, draws, integers, row, slot, token, VOCABULARY, SHAPED))
    tokens = block * BLOCK + tl.arange(0, BLOCK)
    x = scores(logits, stride, shaped, draws, integers, row, slot, tokens, VOCABULARY, SHAPED)
    coldness = tl.load(numbers + slot * NUMBERS + COLDNESS)
    weights, counts = weights_above(x, tokens, top, least + 1, coldness, VOCABULARY)
    tl.store(masses + row * BLOCKS + block, tl.sum(tl.where(counts, mass(weights), 0), 0))
    if block == 0:
        tl.store(winners + row, token)


@triton.jit
def again(
    logits, stride, draws, integers, numbers, shaped, tops, shares, candidates, totals, masses, winners, settled,
    settled_then,
    SLOTS: tl.constexpr, VOCABULARY: tl.constexpr, BLOCK: tl.constexpr, BLOCKS: tl.constexpr, PARTS: tl.constexpr,
    SHAPED: tl.constexpr,
):  # fmt: skip
    """``settled_then`` (rows,) is ``settled`` of the kernels that follow.

    It is not the same memory: warps of one program that read it before and after another program's write would part
    ways, and the sums of those that go on would miss the others' shares.
    """
    row, block = tl.program_id(0), tl.program_id(1)
    if not asks(draws, numbers, tops, settled, row, SLOTS, BLOCKS, PARTS):
        if block == 0:
            tl.store(settled_then + row, 1)
        return
    slot = slot_of(draws, row)
    kept = stays(sum_of(masses, row, BLOCKS, PARTS), totals, numbers, row, slot, BLOCKS, PARTS)
    if block == 0:
        tl.store(settled_then + row, kept.to(tl.int32))
    if kept:
        return
    top = key_in(row_top(tops, row, BLOCKS, PARTS))
    token = tl.load(winners + row)
    least = key_of(scores(logits, stride, shaped, draws, integers, row, slot, token, VOCABULARY, SHAPED))
    tokens = block * BLOCK + tl.arange(0, BLOCK)
    x = scores(logits, stride, shaped, draws, integers, row, slot, tokens, VOCABULARY, SHAPED)
    coldness = tl.load(numbers + slot * NUMBERS + COLDNESS)
    min_p = tl.load(numbers + slot * NUMBERS + MIN_P)
    seed = tl.load(integers + slot * INTEGERS + SEED)
    position = tl.load(draws + row * 3 + 2)
    share, best = best_share(
        x, tokens, top, least + 1, coldness, min_p, seed, position, block * BLOCK, VOCABULARY, BLOCK
    )  # fmt: skip
    tl.store(shares + row * BLOCKS + block, share)
    tl.store(candidates + row * BLOCKS + block, best)


@triton.jit
def settle(
    logits, stride, draws, integers, numbers, shaped, tops, totals, masses, winners, settled,
    SLOTS: tl.constexpr, VOCABULARY: tl.constexpr, BLOCK: tl.constexpr, BLOCKS: tl.constexpr, PARTS: tl.constexpr,
    SHAPED: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    if not asks(draws, numbers, tops, settled, row, SLOTS, BLOCKS, PARTS):
        return
    slot = slot_of(draws, row)
    top = key_in(row_top(tops, row, BLOCKS, PARTS))
    coldness = tl.load(numbers + slot * NUMBERS + COLDNESS)
    min_p = tl.load(numbers + slot * NUMBERS + MIN_P)
    seed = tl.load(integers + slot * INTEGERS + SEED)
    position = tl.load(draws + row * 3 + 2)
    token = tl.load(winners + row)
    above = sum_of(masses, row, BLOCKS, PARTS)
    while not stays(above, totals, numbers, row, slot, BLOCKS, PARTS):
        least = key_of(scores(logits, stride, shaped, draws, integers, row, slot, token, VOCABULARY, SHAPED))
        most = tl.full((), -1.0, tl.float64)
        for first in range(0, VOCABULARY, BLOCK):
            tokens = first + tl.arange(0, BLOCK)
            x = scores(logits, stride, shaped, draws, integers, row, slot, tokens, VOCABULARY, SHAPED)
            share, best = best_share(
                x, tokens, top, least + 1, coldness, min_p, seed, position, first, VOCABULARY, BLOCK
            )  # fmt: skip
            token = tl.where(share > most, best, token)
            most = tl.maximum(share, most)
        least = key_of(scores(logits, stride, shaped, draws, integers, row, slot, token, VOCABULARY, SHAPED))
        above = tl.full((), 0, tl.int64)
        for first in range(0, VOCABULARY, BLOCK):
            tokens = first + tl.arange(0, BLOCK)
            x = scores(logits, stride, shaped, draws, integers, row, slot, tokens, VOCABULARY, SHAPED)
            weights, counts = weights_above(x, tokens, top, least + 1, coldness, VOCABULARY)
            above += tl.sum(tl.where(counts, mass(weights), 0), 0)
    tl.store(winners + row, token)
