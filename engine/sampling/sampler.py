"""Sampling: from logits to one token, per request, the same in any batch, slot and place, and on any device.

Parameter names and their meaning are those of the field (temperature, nucleus sampling arXiv:1904.09751, min-p
arXiv:2407.01082, the penalties of OpenAI's API and of CTRL, arXiv:1909.05858); where two of them meet, those of
``transformers``:

    penalties, logit_bias, then tokens that may not come, then temperature, then top_k, then top_p over the
    renormalised rest, then min_p, then one draw from what is left, renormalised

A draw is Gumbel-max with noise that follows from the request's seed, the token's position and the token
(``philox``), in arithmetic that has the same bits everywhere (``arithmetic``). docs/sampling.md says it for users.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from engine.sampling import arithmetic
from engine.sampling.cut import kth_largest
from engine.sampling.drawing import RowDraw, draw_tokens, groups_of
from engine.sampling.params import Choice, Draw, SamplingRequest
from engine.sampling.shaping import FINITE_MAX, Bits, Scores, Shaping

T = TypeVar("T")
R = TypeVar("R")
DEADLINE_S = 300.0  # for drawing a step's tokens: milliseconds, on a machine that does nothing else
SOME = 1 << 14  # scores at once: what they take stays in the cache


class HostSlots:
    """The sampling state of ``slots`` requests, on the host.

    A draw depends on its row of logits, the request its slot was opened with, and the draw's index and position:
    not on the slot, the batch, or what else is drawn.
    """

    def __init__(self, slots: int, vocabulary: int) -> None:
        self._vocabulary = vocabulary
        self._slots: list[Shaping | None] = [None] * slots
        threads = torch.get_num_threads()
        self._threads = ThreadPoolExecutor(threads, thread_name_prefix="sampling") if threads > 1 else None

    def open(self, slot: int, request: SamplingRequest) -> None:
        """Puts a request into a slot, whatever was there. Raises ``ValueError`` for tokens beyond the vocabulary."""
        self._slots[slot] = Shaping(request, self._vocabulary)

    def bitmasks(self, count: int) -> Bits:
        """(count, ceil(vocabulary / 32)) int32 for ``allow``; what stands in it is undefined."""
        return np.empty((count, -(-self._vocabulary // 32)), np.int32)

    def masked(self, slot: int) -> bool:
        """Whether a slot was opened by a request that is told which tokens may come."""
        return self._at(slot).request.masked

    def allow(self, slots: Sequence[int], bitmasks: Bits) -> None:
        """Which tokens may come next in each of these masked slots: the lowest bit first."""
        for slot, bitmask in zip(slots, bitmasks, strict=True):
            self._at(slot).allow(bitmask, self._vocabulary)

    def last(self, slot: int) -> int:
        """The token that was last drawn in a slot."""
        return self._at(slot).last

    def draw(self, logits: Tensor, draws: Sequence[Draw]) -> list[Choice]:
        """A token for each row of ``logits`` (rows, vocabulary) fp32, which are brought to the CPU."""
        logits = logits.cpu()
        likeliest: list[int] = torch.argmax(logits, dim=-1).tolist()
        rows = [
            _Row(row, token_id, self._at(draw.slot), draw)
            for row, token_id, draw in zip(logits.numpy(), likeliest, draws, strict=True)
        ]
        sampled = [row for row in rows if row.token_id >= 0 and row.state.params.temperature > 0.0]
        groups = groups_of([RowDraw(row.scores, row.state.params, row.draw.position) for row in sampled])
        found = [token_id for tokens in self._each(draw_tokens, groups) for token_id in tokens]
        for row, token_id in zip(sampled, found, strict=True):
            row.token_id = token_id
        reported = [row for row in rows if row.state.params.logprobs]
        self._each(_Row.report, [reported] if len(reported) * self._vocabulary < SOME else [[row] for row in reported])
        return [row.choice() for row in rows]

    def _each(self, work: Callable[[T], R], items: Sequence[T]) -> list[R]:
        """``work`` of each, by several threads if there is more than one."""
        if self._threads is None or len(items) < 2:
            return [work(item) for item in items]
        return list(self._threads.map(work, items, timeout=DEADLINE_S))

    def _at(self, slot: int) -> Shaping:
        state = self._slots[slot]
        if state is None:
            raise ValueError(f"slot: {slot} was not opened")
        return state


class _Row:
    """A row of logits on its way to a token; -1 if there is no number to choose by."""

    def __init__(self, logits: Scores, likeliest: int, state: Shaping, draw: Draw) -> None:
        self.logits, self.likeliest, self.state, self.draw = logits, likeliest, state, draw
        self.scores, self.token_id = logits, likeliest
        self.reported: Choice | None = None
        largest = logits[likeliest]
        if not largest > -np.inf:  # argmax finds the first NaN
            self.token_id = -1
        elif state.changes(draw.index):
            self.scores = state.shape(logits, draw.index)
            self.token_id = int(self.scores.argmax())
            if self.scores[self.token_id] == -np.inf:
                self.token_id = -1
        elif largest == np.inf:
            self.scores = np.minimum(logits, FINITE_MAX)

    @staticmethod
    def report(rows: Sequence[_Row]) -> None:
        """Finds the log-probabilities that rows are asked for."""
        for row in rows:
            if row.token_id >= 0:
                row.reported = report(row.logits, row.likeliest, row.token_id, row.state.params.top_logprobs)

    def choice(self) -> Choice:
        """Remembers the token in its slot."""
        if self.token_id < 0:
            return Choice(-1, None)
        self.state.accept(self.token_id)
        return self.reported or Choice(self.token_id, None)


def report(logits: Scores, likeliest: int, token_id: int, top_logprobs: int) -> Choice:
    """The token with log-probabilities of the model's own distribution: its own and the largest."""
    top = np.float64(min(logits[likeliest], FINITE_MAX)) + 0.0  # -0 as 0
    total = float(arithmetic.ln(np.array([_mass(logits, top)], np.float64) * 2.0**-40)[0])

    def logprob(token: int) -> float:
        return float(np.float64(min(logits[token], FINITE_MAX)) + 0.0 - top) - total

    most = min(top_logprobs, len(logits))
    places = np.flatnonzero(logits >= kth_largest(logits, most)) if most else np.empty(0, np.int64)
    ranked = places[np.argsort(-logits[places], kind="stable")][:most].tolist()
    return Choice(token_id, logprob(token_id), tuple((token, logprob(token)) for token in ranked))


def _mass(logits: Scores, top: np.float64) -> int:
    """Of all scores (vocabulary,), relative to the largest."""
    total = 0
    for first in range(0, len(logits), SOME):
        below = np.minimum(logits[first : first + SOME], FINITE_MAX).astype(np.float64) - top
        total += int(arithmetic.mass(arithmetic.weight(below[below > arithmetic.FLOOR])).sum())
    return total
