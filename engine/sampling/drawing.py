"""Draws the tokens of several rows at a temperature above 0, without exact arithmetic for all that cannot be drawn.

What is drawn is defined exactly: among the tokens kept (``cut.kept``) that of the largest weight / waiting time.
Weights and waiting times in fp32 find the few tokens that may be it, and their sums say whether top_p keeps it; where
those are too close to tell, the exact ones decide. top_p is asked of the token drawn only: if it does not keep it, it
keeps nothing of a smaller score either, and the next to ask is the one drawn among the larger.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from engine.sampling import arithmetic, philox
from engine.sampling.cut import coldness, exponents, kth_largest
from engine.sampling.params import SamplingParams

Scores = NDArray[np.float32]
SLACK = 1e-4  # relative, far above what fp32 gets wrong here
NEVER = 1e-12  # weights below this have no mass and are never drawn
FEW = 6  # a word for each of few tokens costs as much as words for all of so many times as many
GRID = 8192  # counters at once: what they take stays in the cache
TOGETHER = 1 << 16  # tokens of all rows that are drawn together: enough that calls do not count, few enough to stay


@dataclass(frozen=True)
class RowDraw:
    """A row of scores (vocabulary,), fp32, finite or -inf, at least one finite, and what its draw follows from."""

    scores: Scores
    params: SamplingParams
    position: int


class _Row:
    """What is known of a row on the way: tokens (n,) that may be drawn, fp32 weights, and random words' bounds."""

    def __init__(self, draw: RowDraw) -> None:
        self.draw = draw
        scores, params = draw.scores, draw.params
        self.top = scores.max()
        self.tokens: NDArray[np.int64] | None = None  # None: all
        self.scores = scores
        if 0 < params.top_k < len(scores):
            self._keep(np.flatnonzero(scores >= kth_largest(scores, params.top_k)))
        self.weights = self._weights()
        self.total = float(self.weights.sum())
        floor = max(NEVER, params.min_p * (1.0 - SLACK))
        if params.top_p < 1.0:  # all below this together are less than what top_p leaves out
            spare = (1.0 - params.top_p) * self.total / len(self.weights) - 2.0 / arithmetic.MASS_ONE
            floor = max(floor, spare * (1.0 - SLACK))
        self._keep_above(floor)
        self.words: NDArray[np.uint32] = np.empty(0, np.uint32)
        self.bounds: Scores = np.empty(0, np.float32)

    def _weights(self) -> Scores:
        cold = coldness(self.draw.params.temperature)
        with np.errstate(over="ignore", under="ignore"):
            if cold < 1e30:
                weights: Scores = np.exp((self.scores - self.top) * np.float32(cold))
                return weights
            return np.exp((self.scores.astype(np.float64) - np.float64(self.top)) * cold).astype(np.float32)

    def _keep(self, places: NDArray[np.int64]) -> None:
        self.tokens = places if self.tokens is None else self.tokens[places]
        self.scores = self.scores[places]

    def _keep_above(self, floor: float) -> None:
        large = self.weights >= np.float32(floor)
        if np.count_nonzero(large) * FEW < len(self.draw.scores):
            places = np.flatnonzero(large)
            self._keep(places)
            self.weights = self.weights[places]

    def hear(self, words: NDArray[np.uint32]) -> None:
        """Takes the random words of its tokens; a share is at most weight / (1 - u), since -ln(u) is at least 1 - u."""
        self.words = words
        rest: Scores = np.invert(words).astype(np.float32)
        rest += np.float32(0.5)
        rest *= np.float32(2.0**-32)
        self.bounds = self.weights / rest
        if self.draw.params.min_p > 0.0:
            self.bounds[self.weights < self.draw.params.min_p * (1.0 - SLACK)] = 0.0

    def candidates(self) -> NDArray[np.int64]:
        """Places of all tokens that may have the largest share."""
        bounds, min_p = self.bounds, self.draw.params.min_p
        if min_p > 0.0:  # of the likeliest token the weight is 1
            bounds = np.where(self.weights >= min(min_p * (1.0 + SLACK), 1.0), bounds, np.float32(0.0))
        best = int(bounds.argmax())
        share = float(self.weights[best]) / -math.log((float(self.words[best]) + 0.5) * 2.0**-32)
        return np.flatnonzero(self.bounds >= np.float32(share * (1.0 - SLACK)))

    def kept(self, place: int) -> bool:
        """Whether top_p keeps the token there."""
        params = self.draw.params
        if params.top_p == 1.0:
            return True
        larger = self.scores > self.scores[place]
        above = float((self.weights * larger).sum())
        limit = params.top_p * self.total
        if abs(above - limit) > SLACK * self.total:
            return above < limit
        return self._kept_exactly(self.scores[place])

    def _kept_exactly(self, score: np.float32) -> bool:
        params, scores = self.draw.params, self.draw.scores
        z = exponents(scores, params.temperature)
        counts = z > arithmetic.FLOOR
        if 0 < params.top_k < len(scores):
            counts &= scores >= kth_largest(scores, params.top_k)
        masses = arithmetic.mass(arithmetic.weight(z[counts]))
        above = masses[scores[counts] > score].sum()
        return bool(np.float64(above) < params.top_p * np.float64(masses.sum()))

    def drop(self, place: int) -> None:
        """Neither the token there nor any of a smaller score is kept."""
        self.bounds[self.scores <= self.scores[place]] = 0.0


def groups_of(draws: Sequence[RowDraw]) -> list[Sequence[RowDraw]]:
    """Rows in groups that are best drawn together, in order."""
    together = max(1, TOGETHER // max((len(draw.scores) for draw in draws), default=1))
    return [draws[first : first + together] for first in range(0, len(draws), together)]


def draw_tokens(draws: Sequence[RowDraw]) -> list[int]:
    """The token of each row, all of one vocabulary; what it is does not depend on the others."""
    if not draws:
        return []
    rows = [_Row(draw) for draw in draws]
    _hear(rows)
    found = [0] * len(rows)
    left = list(range(len(rows)))
    while left:
        rejected = []
        for index, place in zip(left, _largest_shares([rows[index] for index in left]), strict=True):
            row = rows[index]
            if row.kept(place):
                found[index] = place if row.tokens is None else int(row.tokens[place])
            else:
                row.drop(place)
                rejected.append(index)
        left = rejected
    return found


def _largest_shares(rows: list[_Row]) -> list[int]:
    """Of each row the place of the token of the largest share, by exact arithmetic among those that may be it."""
    places = [row.candidates() for row in rows]
    z = [_exponents(row, some) for row, some in zip(rows, places, strict=True)]
    joined = np.concatenate(z)
    weights = arithmetic.weight(np.maximum(joined, arithmetic.FLOOR))
    words = np.concatenate([row.words[some] for row, some in zip(rows, places, strict=True)])
    least = np.concatenate([np.full(len(some), row.draw.params.min_p) for row, some in zip(rows, places, strict=True)])
    shares = np.where((joined > arithmetic.FLOOR) & (weights >= least), weights / arithmetic.waiting(words), -1.0)
    found, first = [], 0
    for some in places:
        found.append(int(some[shares[first : first + len(some)].argmax()]))
        first += len(some)
    return found


def _exponents(row: _Row, places: NDArray[np.int64]) -> arithmetic.Floats:
    below = row.scores[places].astype(np.float64) - np.float64(row.top)
    with np.errstate(over="ignore"):
        quotient: arithmetic.Floats = below * coldness(row.draw.params.temperature)
    return quotient


def _hear(rows: list[_Row]) -> None:
    """Gives each row its random words."""
    few = [row for row in rows if row.tokens is not None]
    if few:
        sizes = [len(row.scores) for row in few]
        seeds = np.repeat(np.array([row.draw.params.seed for row in few], np.uint64), sizes)
        positions = np.repeat(np.array([row.draw.position for row in few], np.uint64), sizes)
        tokens = np.concatenate([row.tokens for row in few if row.tokens is not None]).astype(np.uint64)
        parts = [
            philox.words_of(seeds[first : first + GRID], positions[first : first + GRID], tokens[first : first + GRID])
            for first in range(0, len(tokens), GRID)
        ]
        words = np.concatenate(parts).astype(np.uint32)
        for row, end in zip(few, np.cumsum(sizes).tolist(), strict=True):
            row.hear(words[end - len(row.scores) : end])
    many = [row for row in rows if row.tokens is None]
    if many:
        _hear_all(many)


def _hear_all(rows: list[_Row]) -> None:
    vocabulary = len(rows[0].scores)
    seeds = np.array([row.draw.params.seed for row in rows], np.uint64)[:, None]
    positions = np.array([row.draw.position for row in rows], np.uint64)[:, None]
    keys = philox.schedule(philox.halves(seeds))
    counters = -(-vocabulary // 4)
    words = np.empty((len(rows), counters, 4), np.uint32)
    some = max(1, GRID // len(rows))
    for first in range(0, counters, some):
        last = min(first + some, counters)
        for word, part in enumerate(philox.grid(positions, np.arange(first, last, dtype=np.uint64), keys)):
            words[:, first:last, word] = part
    for row, flat in zip(rows, words.reshape(len(rows), -1), strict=True):
        row.hear(flat[:vocabulary])
