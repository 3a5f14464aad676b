"""The arithmetic of draws: near enough to exp and ln, and the same bits as one operation after another."""

from __future__ import annotations

import math

import numpy as np

from engine.sampling import arithmetic

Z = np.concatenate([np.linspace(arithmetic.FLOOR, 0.0, 2000), -np.logspace(-300, 0, 200), [-0.0, 0.0]])
X = np.concatenate([np.linspace(1e-9, 1.0, 2000), 1.0 - np.logspace(-16, -1, 200), [2.0**-33, 1.0 - 2.0**-33, 1e12]])


def by_hand_weight(z: float) -> float:
    """Python's floats are never contracted."""
    rounded = z * arithmetic.LOG2_E + arithmetic.ROUND
    whole = rounded - arithmetic.ROUND
    rest = z - whole * arithmetic.LN2_HIGH
    rest = rest - whole * arithmetic.LN2_LOW
    total = arithmetic.EXP[0]
    for factor in arithmetic.EXP[1:]:
        total = total * rest + factor
    return math.ldexp(total, int(whole))


def by_hand_ln(x: float) -> float:
    mantissa, exponent = math.frexp(x)
    mantissa, exponent = mantissa * 2.0, exponent - 1
    if mantissa >= math.sqrt(2.0):
        mantissa, exponent = mantissa / 2.0, exponent + 1
    over = mantissa - 1.0
    s = over / (over + 2.0)
    square = s * s
    total = arithmetic.LN[0]
    for factor in arithmetic.LN[1:]:
        total = total * square + factor
    return exponent * arithmetic.LN2_HIGH + (exponent * arithmetic.LN2_LOW + s * total)


def test_the_bits_are_those_of_one_operation_after_another() -> None:
    assert arithmetic.weight(Z).tolist() == [by_hand_weight(z) for z in Z.tolist()]
    assert arithmetic.ln(X).tolist() == [by_hand_ln(x) for x in X.tolist()]


def test_they_are_near_exp_and_ln() -> None:
    np.testing.assert_allclose(arithmetic.weight(Z), np.exp(Z), rtol=2e-11)
    np.testing.assert_allclose(arithmetic.ln(X), np.log(X), rtol=5e-12)
    assert arithmetic.weight(np.zeros(1))[0] == 1.0


def test_what_is_below_the_floor_has_no_mass_and_never_wins() -> None:
    edge = arithmetic.weight(np.array([arithmetic.FLOOR]))
    assert arithmetic.mass(edge)[0] == 0
    shortest, longest = arithmetic.waiting(np.array([2**32 - 1, 0], np.uint64))
    assert shortest > 0.0
    assert edge[0] / shortest < 1.0 / longest, "the likeliest token's worst share is larger"


def test_waiting_times_are_exponentially_distributed() -> None:
    words = np.random.default_rng(0).integers(0, 2**32, 100_000, dtype=np.uint64)
    times = arithmetic.waiting(words)
    for quantile in (0.01, 0.1, 0.5, 0.9, 0.99):
        assert abs(np.mean(times < -math.log(1.0 - quantile)) - quantile) < 0.005
