"""The arithmetic of a draw, the same bits on every device: numpy here, Triton in ``engine.run.cuda.sampling``.

Only additions, multiplications and divisions of IEEE arithmetic, in a fixed order and never contracted, and integers:
what numpy computes one operation after another and what a kernel computes without fused multiply-add are then equal.

    weight(z) = e^z                      fp64, a polynomial; 1 at 0
    mass(z)   = int64(2^40 weight(z))    integers, so that a sum does not depend on its order
    waiting(w) = -ln((w + 1/2) / 2^32)   fp64, exponentially distributed if w is a random uint32

A token of weight e is drawn if e / waiting is the largest, which is Gumbel-max without a logarithm of the weight.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]

FLOOR = -28.0  # e^-28 has no mass, and can never be drawn: its share is below that of the likeliest token's worst wait
MASS_ONE = 2.0**40
ROUND = 1.5 * 2.0**52  # added and taken away again, it rounds to a whole number, which stands in the lowest bits
ROUND_BITS = 0x4338000000000000
LOG2_E = 1.4426950408889634
LN2_HIGH = 6.93147180369123816490e-01  # 33 bits: a product with a whole number below 2^20 is exact
LN2_LOW = 1.90821492927058770002e-10
EXP = tuple(1.0 / math.factorial(power) for power in range(9, -1, -1))  # wrong by 7e-12 at most within ln2 / 2
LN = tuple(2.0 / power for power in range(13, 0, -2))  # of atanh, to s^13: wrong by 2e-12 at most
SQRT2_BITS = 0x3FF6A09E667F3BCD
ONE_BITS = 0x3FF0000000000000
MANTISSA = 0x000FFFFFFFFFFFFF


def weight(z: Floats) -> Floats:
    """e^z for z in ``FLOOR``..0."""
    rounded = z * LOG2_E + ROUND
    whole = rounded - ROUND
    rest = z - whole * LN2_HIGH
    rest = rest - whole * LN2_LOW
    total: Any = np.full_like(z, EXP[0])
    for factor in EXP[1:]:
        total *= rest
        total += factor
    power = rounded.view(np.int64) - (ROUND_BITS - 1023) << 52
    scaled: Floats = total * power.view(np.float64)
    return scaled


def mass(weights: Floats) -> Integers:
    """Fixed point with 40 binary digits, rounded down."""
    return (weights * MASS_ONE).astype(np.int64)


def ln(x: Floats) -> Floats:
    """Natural logarithm of normal positive numbers."""
    bits = x.view(np.int64)
    exponent = (bits >> 52) - 1023
    mantissa = bits & MANTISSA | ONE_BITS
    large = mantissa >= SQRT2_BITS
    exponent = exponent + large
    mantissa = mantissa - (large.astype(np.int64) << 52)
    over = mantissa.view(np.float64) - 1.0
    s = over / (over + 2.0)
    square = s * s
    total = np.full_like(x, LN[0])
    for factor in LN[1:]:
        total *= square
        total += factor
    power = exponent.astype(np.float64)
    result: Floats = power * LN2_HIGH + (power * LN2_LOW + s * total)
    return result


def waiting(words: NDArray[Any]) -> Floats:
    """How long a token waits whose random word (uint32, in any integer type) this is: exponential with mean 1."""
    return -ln((words.astype(np.float64) + 0.5) * 2.0**-32)
