"""Bounds of the histograms that both services keep."""

from __future__ import annotations

STEPS = (1.0, 1.25, 1.6, 2.0, 2.5, 3.2, 4.0, 5.0, 6.3, 8.0)  # ten a decade


def buckets(lowest_exponent: int, highest_exponent: int) -> tuple[float, ...]:
    """Bounds from 10^lowest to 10^highest, ten a decade.

    Neighbours differ by a quarter, so a quantile that Prometheus interpolates is at most that far from the true one,
    usually half of it.
    """
    decades = range(lowest_exponent, highest_exponent)
    bounds = [round(step * 10.0**exponent, 9) for exponent in decades for step in STEPS]
    return (*bounds, 10.0**highest_exponent)


SECONDS_BUCKETS = buckets(-3, 2)
SHORT_SECONDS_BUCKETS = buckets(-4, 2)  # for what may take less than a millisecond
TOKENS_BUCKETS = tuple(float(1 << exponent) for exponent in range(21))
