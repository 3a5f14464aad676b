"""What a request changes about the scores before a token is chosen: penalties, bias, and tokens that may not come.

All of it is fp32 arithmetic of one operation after another; ``engine.run.cuda.sampling`` does the same.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from engine.sampling.params import SamplingRequest

Scores = NDArray[np.float32]
Bits = NDArray[np.int32]
FINITE_MAX = np.finfo(np.float32).max


class Shaping:
    """One slot's: what was asked for, and the tokens that penalties count."""

    def __init__(self, request: SamplingRequest, vocabulary: int) -> None:
        self.request = request
        self.params = request.params
        self.allowed: NDArray[np.bool_] | None = None
        self.last = request.generated[-1] if request.generated else 0
        self._stops = np.array(sorted(request.stop_token_ids), np.int64)
        self._bias = sorted(self.params.logit_bias)
        self._counts = np.zeros(vocabulary if self.params.penalises else 0, np.int32)
        self._seen = np.zeros(len(self._counts), np.bool_)
        if self.params.penalises:
            self._seen[np.array(request.prompt, np.int64)] = True
            np.add.at(self._counts, np.array(request.generated, np.int64), 1)

    def allow(self, bitmask: Bits, vocabulary: int) -> None:
        """See ``HostSlots.allow``."""
        octets = bitmask.astype("<i4", copy=False).view(np.uint8)
        self.allowed = np.unpackbits(octets, bitorder="little", count=vocabulary).view(np.bool_)

    def accept(self, token_id: int) -> None:
        """Counts a token that was drawn."""
        self.last = token_id
        if self.params.penalises:
            self._counts[token_id] += 1

    def changes(self, index: int) -> bool:
        """Whether the scores of the draw after ``index`` tokens are others than the model's."""
        params = self.params
        return (
            params.penalises
            or bool(params.logit_bias)
            or (index < params.min_tokens and len(self._stops) > 0)
            or self.allowed is not None
        )

    def shape(self, logits: Scores, index: int) -> Scores:
        """The scores (vocabulary,) to choose by: finite, or -inf for tokens that may not come.

        ``logits`` (vocabulary,) has no NaN. Before ``min_tokens`` the end tokens may not come, unless nothing else can.
        """
        with np.errstate(over="ignore"):
            scores = np.clip(self._penalise(logits), -FINITE_MAX, FINITE_MAX)
            for token, bias in self._bias:
                scores[token] += np.float32(bias)
        np.clip(scores, -FINITE_MAX, FINITE_MAX, out=scores)
        scores[logits == -np.inf] = -np.inf
        if self.allowed is not None:
            np.copyto(scores, -np.inf, where=~self.allowed)
        if index < self.params.min_tokens:
            others = scores.copy()
            others[self._stops] = -np.inf
            if others.max() > -np.inf:
                return others
        return scores

    def _penalise(self, logits: Scores) -> Scores:
        params = self.params
        if not params.penalises:
            return logits.copy()
        scores = logits.copy()
        seen = np.flatnonzero(self._seen | (self._counts > 0))
        score, factor = scores[seen], np.float32(params.repetition_penalty)
        if params.repetition_penalty != 1.0:
            score = np.where(score > 0, score / factor, score * factor)
        score = np.clip(score, -FINITE_MAX, FINITE_MAX)
        counts = self._counts[seen]
        less = counts.astype(np.float32) * np.float32(params.frequency_penalty)
        less = less + np.float32(params.presence_penalty)
        scores[seen] = np.where(counts > 0, score - less, score)
        return scores
