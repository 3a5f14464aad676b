"""Which tokens stay: top_k, then top_p of what it left, then min_p, as in ``transformers``.

A token stays, whatever ties with it,

    top_k   if fewer than k tokens have a larger score
    top_p   if the mass of all tokens of larger scores is below top_p of the mass that top_k left
    min_p   if its weight is at least min_p of the largest
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from engine.sampling import arithmetic
from engine.sampling.params import SamplingParams

QUOTIENT_MAX = 1e300
GROUP = 64


def coldness(temperature: float) -> float:
    """What a score's distance to the largest is multiplied by."""
    return min(1.0 / temperature, QUOTIENT_MAX)


def exponents(scores: NDArray[np.float32], temperature: float) -> arithmetic.Floats:
    """Of each score (fp32, finite or -inf, at least one finite): how far below the largest it is, in temperatures."""
    below = scores.astype(np.float64) - np.float64(scores.max())
    with np.errstate(over="ignore"):
        quotient: arithmetic.Floats = below * coldness(temperature)
    return quotient


def kept(scores: NDArray[np.float32], params: SamplingParams) -> tuple[NDArray[np.int64], arithmetic.Floats]:
    """Token ids (kept,) that a draw at a temperature above 0 can give, in rising order, and their weights (kept,)."""
    z = exponents(scores, params.temperature)
    tokens = np.flatnonzero(z > arithmetic.FLOOR)
    if 0 < params.top_k < len(tokens):
        tokens = tokens[scores[tokens] >= kth_largest(scores[tokens], params.top_k)]
    weights = arithmetic.weight(z[tokens])
    if params.top_p < 1.0:
        stays = _within(scores[tokens], arithmetic.mass(weights), params.top_p)
        tokens, weights = tokens[stays], weights[stays]
    if params.min_p > 0.0:
        stays = weights >= params.min_p
        tokens, weights = tokens[stays], weights[stays]
    return tokens, weights


def kth_largest(scores: NDArray[np.float32], k: int) -> np.float32:
    """The k-th largest score of (n,), 1 <= k <= n, none of them NaN."""
    groups = len(scores) // GROUP
    if k <= groups:  # k groups have a score of at least the k-th largest of their largest
        largest = scores[: groups * GROUP].reshape(groups, GROUP).max(axis=1)
        scores = scores[scores >= np.partition(largest, groups - k)[groups - k]]
    found: np.float32 = np.partition(scores, len(scores) - k)[len(scores) - k]
    return found


def _within(scores: NDArray[np.float32], masses: arithmetic.Integers, top_p: float) -> NDArray[np.bool_]:
    order = np.argsort(-scores)
    ranked = scores[order]
    before = np.cumsum(masses[order]) - masses[order]
    first = np.searchsorted(-ranked, -ranked, side="left")  # of those that tie
    stays = np.empty(len(scores), np.bool_)
    stays[order] = before[first].astype(np.float64) < top_p * np.float64(masses.sum())
    return stays
