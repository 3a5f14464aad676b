# mypy: ignore-errors
"""``engine.sampling.arithmetic`` in Triton, to be launched with ``enable_fp_fusion=False``: the same bits.

Scores are compared as keys: int32 in the order of the fp32 scores, NaN above all.
"""

from __future__ import annotations

import triton
import triton.language as tl

from engine.sampling import arithmetic

FINITE_MAX = tl.constexpr(3.4028234663852886e38)
LEAST = tl.constexpr(-(2**31))  # below every key

FLOOR = tl.constexpr(arithmetic.FLOOR)
MASS_ONE = tl.constexpr(arithmetic.MASS_ONE)
ROUND = tl.constexpr(arithmetic.ROUND)
POWER_BASE = tl.constexpr(arithmetic.ROUND_BITS - 1023)
LOG2_E = tl.constexpr(arithmetic.LOG2_E)
LN2_HIGH = tl.constexpr(arithmetic.LN2_HIGH)
LN2_LOW = tl.constexpr(arithmetic.LN2_LOW)
EXP = tl.constexpr(arithmetic.EXP)
EXP_TERMS = tl.constexpr(len(arithmetic.EXP))
LN = tl.constexpr(arithmetic.LN)
LN_TERMS = tl.constexpr(len(arithmetic.LN))
SQRT2_BITS = tl.constexpr(arithmetic.SQRT2_BITS)
ONE_BITS = tl.constexpr(arithmetic.ONE_BITS)
MANTISSA = tl.constexpr(arithmetic.MANTISSA)


@triton.jit
def weight(z):
    """e^z in fp64, for z in FLOOR..0."""
    rounded = z * LOG2_E + ROUND
    whole = rounded - ROUND
    rest = z - whole * LN2_HIGH
    rest = rest - whole * LN2_LOW
    total = rest * EXP[0] + EXP[1]
    for term in tl.static_range(2, EXP_TERMS):
        total = total * rest + EXP[term]
    power = (rounded.to(tl.int64, bitcast=True) - POWER_BASE) << 52
    return total * power.to(tl.float64, bitcast=True)


@triton.jit
def mass(weights):
    return (weights * MASS_ONE).to(tl.int64)


@triton.jit
def ln(x):
    """Natural logarithm in fp64 of normal positive numbers."""
    bits = x.to(tl.int64, bitcast=True)
    exponent = (bits >> 52) - 1023
    mantissa = (bits & MANTISSA) | ONE_BITS
    large = (mantissa >= SQRT2_BITS).to(tl.int64)
    exponent += large
    mantissa -= large << 52
    over = mantissa.to(tl.float64, bitcast=True) - 1.0
    s = over / (over + 2.0)
    square = s * s
    total = square * LN[0] + LN[1]
    for term in tl.static_range(2, LN_TERMS):
        total = total * square + LN[term]
    power = exponent.to(tl.float64)
    return power * LN2_HIGH + (power * LN2_LOW + s * total)


@triton.jit
def waiting(words):
    """Exponentially distributed, of random words (uint32)."""
    return -ln((words.to(tl.float64) + 0.5) * 2.3283064365386963e-10)


@triton.jit
def random_words(seed, position, first, BLOCK: tl.constexpr):
    """The words (BLOCK,) uint32 of the tokens from ``first``, a multiple of 4."""
    counter = (first // 4 + tl.arange(0, BLOCK // 4)).to(tl.uint32)
    nothing = tl.zeros_like(counter)
    a, b, c, d = tl.philox(seed, counter, nothing + position.to(tl.uint32), nothing, nothing)
    return tl.interleave(tl.interleave(a, c), tl.interleave(b, d))


@triton.jit
def finite(x):
    """fp32 scores with infinity as the largest number; -inf and NaN as they are."""
    return tl.where(x > FINITE_MAX, FINITE_MAX, x)


@triton.jit
def key_of(x):
    """int32 in the order of fp32 scores; -0 as 0, NaN above all."""
    bits = (x + 0.0).to(tl.int32, bitcast=True)
    key = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    return tl.where(x == x, key, 0x7FFFFFFF)


@triton.jit
def score_of(key):
    """The fp32 score of a key that is no NaN's."""
    return (key ^ ((key >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def ranked(key, tokens):
    """int64: the largest is that of the largest key, of equals of the lowest token."""
    return (key.to(tl.int64) << 32) | (0x7FFFFFFF - tokens).to(tl.int64)


@triton.jit
def key_in(rank):
    return (rank >> 32).to(tl.int32)


@triton.jit
def token_in(rank):
    return 0x7FFFFFFF - (rank & 0xFFFFFFFF).to(tl.int32)
