# mypy: ignore-errors
"""What a request changes about the scores (``engine.sampling.shaping`` on the device): logits -> fp32 ``shaped``.

shape     penalties, bias, tokens that are not allowed; programs (row, block)
forbid    end tokens before ``min_tokens``, unless nothing else can come; programs (row,)
"""

from __future__ import annotations

import triton
import triton.language as tl

from engine.run.cuda.sampling.state import (
    ALLOWS,
    BIASES,
    FLAGS,
    FREQUENCY,
    INTEGERS,
    MIN_TOKENS,
    NUMBERS,
    PENALISES,
    PRESENCE,
    REPETITION,
    STOPS,
    bits_of,
    bounded,
    raw_scores,
    reshaped,
    slot_of,
)


@triton.jit
def penalised(x, row, slot, tokens, numbers, counts, prompts, VOCABULARY: tl.constexpr):
    inside = tokens < VOCABULARY
    count = tl.load(counts + slot * VOCABULARY + tokens, mask=inside, other=0)
    seen = (count > 0) | (bits_of(prompts, slot, tokens, VOCABULARY) != 0)
    repetition = tl.load(numbers + slot * NUMBERS + REPETITION).to(tl.float32)
    frequency = tl.load(numbers + slot * NUMBERS + FREQUENCY).to(tl.float32)
    presence = tl.load(numbers + slot * NUMBERS + PRESENCE).to(tl.float32)
    if repetition != 1.0:
        repeated = bounded(tl.where(x > 0, tl.div_rn(x, tl.zeros_like(x) + repetition), x * repetition))
        x = tl.where(seen, repeated, x)
    less = count.to(tl.float32) * frequency
    less = less + presence
    return tl.where(count > 0, x - less, x)


@triton.jit
def shape(
    logits, stride, draws, integers, numbers, counts, prompts, allowed, stops, bias_tokens, biases, bias_starts,
    shaped, others,
    SLOTS: tl.constexpr, VOCABULARY: tl.constexpr, BLOCK: tl.constexpr, BLOCKS: tl.constexpr, BIASES_MAX: tl.constexpr,
):  # fmt: skip
    """``others`` (rows, BLOCKS) int32: whether a token that is no end token can come."""
    row, block = tl.program_id(0), tl.program_id(1)
    slot = slot_of(draws, row)
    if slot == SLOTS:
        return
    if not reshaped(draws, integers, row, slot):
        return
    flags = tl.load(integers + slot * INTEGERS + FLAGS)
    tokens = block * BLOCK + tl.arange(0, BLOCK)
    raw = raw_scores(logits, stride, row, tokens, VOCABULARY)
    x = raw
    if (flags & PENALISES) != 0:
        x = penalised(x, row, slot, tokens, numbers, counts, prompts, VOCABULARY)
    if (flags & BIASES) != 0:
        first = tl.load(bias_starts + slot * (BLOCKS + 1) + block)
        last = tl.load(bias_starts + slot * (BLOCKS + 1) + block + 1)
        for entry in range(first, last):
            token = tl.load(bias_tokens + slot * BIASES_MAX + entry)
            x = tl.where(tokens == token, x + tl.load(biases + slot * BIASES_MAX + entry), x)
    x = tl.where(raw > float("-inf"), bounded(x), raw)  # NaN stays, and what could not come cannot
    if (flags & ALLOWS) != 0:
        may = bits_of(allowed, slot, tokens, VOCABULARY) != 0
        x = tl.where(may | (x != x), x, float("-inf"))
    tl.store(shaped + row.to(tl.int64) * VOCABULARY + tokens, x, mask=tokens < VOCABULARY)
    if (flags & STOPS) != 0:
        other = (x > float("-inf")) & (bits_of(stops, slot, tokens, VOCABULARY) == 0)
        tl.store(others + row * BLOCKS + block, tl.max(other.to(tl.int32), 0))


@triton.jit
def forbid(
    draws, integers, stops, shaped, others,
    SLOTS: tl.constexpr, VOCABULARY: tl.constexpr, BLOCK: tl.constexpr, BLOCKS: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    slot = slot_of(draws, row)
    if slot == SLOTS:
        return
    flags = tl.load(integers + slot * INTEGERS + FLAGS)
    early = tl.load(draws + row * 3 + 1) < tl.load(integers + slot * INTEGERS + MIN_TOKENS)
    if ((flags & STOPS) != 0) & early:
        part = tl.arange(0, PARTS)
        if tl.max(tl.load(others + row * BLOCKS + part, mask=part < BLOCKS, other=0), 0) > 0:
            at = shaped + row.to(tl.int64) * VOCABULARY
            for first in range(0, VOCABULARY, BLOCK):
                tokens = first + tl.arange(0, BLOCK)
                stop = bits_of(stops, slot, tokens, VOCABULARY) != 0
                x = tl.load(at + tokens, mask=stop, other=0.0)
                tl.store(at + tokens, tl.full((BLOCK,), float("-inf"), tl.float32), mask=stop & (x == x))
