# mypy: ignore-errors
"""What kernels read about a row: its slot's table entries, and its scores."""

from __future__ import annotations

import triton
import triton.language as tl

from engine.run.cuda.sampling.arithmetic import FINITE_MAX, finite

# columns of the table of integers, of a slot
FLAGS = tl.constexpr(0)
TOP_K = tl.constexpr(1)  # 0: all
MIN_TOKENS = tl.constexpr(2)
SEED = tl.constexpr(3)
REPORT = tl.constexpr(4)  # 0: nothing, 1 + n: the drawn token's log-probability and the n likeliest
INTEGERS = tl.constexpr(16)
# columns of the table of fp64 numbers
COLDNESS = tl.constexpr(0)  # 1 / temperature, 0: greedy
TOP_P = tl.constexpr(1)
MIN_P = tl.constexpr(2)
REPETITION = tl.constexpr(3)
FREQUENCY = tl.constexpr(4)
PRESENCE = tl.constexpr(5)
NUMBERS = tl.constexpr(16)
# flags
PENALISES = tl.constexpr(1)
BIASES = tl.constexpr(2)
ALLOWS = tl.constexpr(4)  # only some tokens
STOPS = tl.constexpr(8)  # has tokens that may not come before MIN_TOKENS


@triton.jit
def slot_of(draws, row):
    return tl.load(draws + row * 3).to(tl.int64)


@triton.jit
def reshaped(draws, integers, row, slot):
    """Whether a row's scores are others than the model's, and stand in ``shaped``."""
    flags = tl.load(integers + slot * INTEGERS + FLAGS)
    early = tl.load(draws + row * 3 + 1) < tl.load(integers + slot * INTEGERS + MIN_TOKENS)
    return ((flags & (PENALISES | BIASES | ALLOWS)) != 0) | (((flags & STOPS) != 0) & early)


@triton.jit
def raw_scores(logits, stride, row, tokens, VOCABULARY: tl.constexpr):
    """fp32, infinity as the largest number, -inf beyond the vocabulary."""
    x = tl.load(logits + row.to(tl.int64) * stride + tokens, mask=tokens < VOCABULARY, other=float("-inf"))
    return finite(x.to(tl.float32))


@triton.jit
def scores(
    logits, stride, shaped, draws, integers, row, slot, tokens, VOCABULARY: tl.constexpr, SHAPED: tl.constexpr
):  # fmt: skip
    """The scores that a row's token is chosen by."""
    if SHAPED:
        if reshaped(draws, integers, row, slot):
            inside = tokens < VOCABULARY
            x = tl.load(shaped + row.to(tl.int64) * VOCABULARY + tokens, mask=inside, other=float("-inf"))
        else:
            x = raw_scores(logits, stride, row, tokens, VOCABULARY)
    else:
        x = raw_scores(logits, stride, row, tokens, VOCABULARY)
    return x


@triton.jit
def bits_of(words, slot, tokens, VOCABULARY: tl.constexpr):
    """Of each token, its bit (0 or 1) in a slot's row of (slots, ceil(VOCABULARY / 32)) int32; 0 beyond."""
    WORDS: tl.constexpr = (VOCABULARY + 31) // 32
    word = tl.load(words + slot * WORDS + tokens // 32, mask=tokens < VOCABULARY, other=0)
    return (word >> (tokens % 32)) & 1


@triton.jit
def bounded(x):
    """Scores within the finite numbers, whatever a penalty has made of them; NaN stays."""
    return tl.where(x < -FINITE_MAX, -FINITE_MAX, finite(x))
