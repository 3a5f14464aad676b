"""Histograms know durations to a quarter."""

from __future__ import annotations

from itertools import pairwise

from serving.trace.buckets import SECONDS_BUCKETS


def test_neighbouring_buckets_differ_by_a_quarter() -> None:
    assert SECONDS_BUCKETS[0] == 0.001 and SECONDS_BUCKETS[-1] == 100.0
    assert all(1.2 < high / low < 1.3 for low, high in pairwise(SECONDS_BUCKETS))
