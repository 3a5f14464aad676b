"""Counts as places in one line."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from engine.run.cuda.cascade.reads import Ints


def starts_of(counts: npt.NDArray[np.integer]) -> Ints:
    """Exclusive sums with the total last: [2, 1] -> [0, 2, 3]."""
    starts = np.zeros(len(counts) + 1, np.int32)
    np.cumsum(counts, out=starts[1:])
    return starts


def ranges_of(first: Ints, counts: Ints) -> Ints:
    """first[0] .. first[0] + counts[0] - 1, first[1] .., in one line."""
    starts = starts_of(counts)
    return (np.arange(starts[-1], dtype=np.int32) + np.repeat(first - starts[:-1], counts)).astype(np.int32)
