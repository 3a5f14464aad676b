"""Sampling: from logits to one token, per request, with its own seeded generator.

Neighbours in a batch never change a draw: every request has its own generator and its own row. Parameter names and
their meaning are those of the field (temperature, nucleus sampling arXiv:1904.09751, min-p arXiv:2407.01082, the
penalties of OpenAI's API and of CTRL, arXiv:1909.05858); where two of them meet, those of ``transformers``:

    penalties, then tokens that may not end the answer yet, then temperature, then top_k, then top_p over the
    renormalised rest, then min_p, then one draw from what is left, renormalised

docs/sampling.md says the same for users, with what happens to ties.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from engine.sampling import arithmetic
from engine.sampling.cut import kth_largest
from engine.sampling.drawing import RowDraw, draw_tokens
from engine.sampling.params import Choice, Draw, SamplingParams, SamplingRequest
from engine.sampling.shaping import FINITE_MAX, Scores, Shaping

SOME = 1 << 14  # scores at once: what they take stays in the cache
DOUBLE_MAX = torch.finfo(torch.float64).max


class Sampler:
    """One request's sampling state: its generator and the tokens that penalties count."""

    def __init__(self, params: SamplingParams, prompt: Sequence[int], stop_token_ids: frozenset[int]) -> None:
        """``stop_token_ids``: those of ``stops_at`` that the vocabulary has."""
        self.params = params
        self._stop_token_ids = sorted(stop_token_ids)
        self._generator = torch.Generator().manual_seed(params.seed)
        self._prompt = torch.tensor(sorted(set(prompt)), dtype=torch.int64)
        self._generated: list[int] = []

    def choose(self, logits: Tensor) -> Choice:
        """Picks from one row of logits (vocabulary,), fp32 on the CPU, and remembers the token.

        Raises ``ArithmeticError`` if the model gave no number to choose by.
        """
        token_id = int(torch.argmax(logits)) if self.params.plain_greedy else self._draw(self._shape(logits))
        if not float(logits[token_id]) > float("-inf"):  # argmax finds the first NaN
            raise ArithmeticError(f"logits: the model gave {float(logits[token_id])} for its likeliest token")
        self._generated.append(token_id)
        logprob = float(torch.log_softmax(logits, dim=-1)[token_id]) if self.params.logprobs else None
        return Choice(token_id, logprob)

    def accept(self, token_id: int) -> Choice:
        """Remembers a token that was picked greedily elsewhere (on the device, for a whole batch)."""
        self._generated.append(token_id)
        return Choice(token_id, None)

    def _shape(self, logits: Tensor) -> Tensor:
        """Applies penalties and forbids stopping before ``min_tokens``; fp64, finite where the logits are not -inf."""
        params = self.params
        shaped = logits.to(torch.float64, copy=True)  # an fp32 score divided by 1e-38 is a number here
        possible = shaped > float("-inf")
        if not bool(possible.any()) or bool(shaped.isnan().any()):
            raise ArithmeticError("logits: the model gave NaN, or -inf for every token")
        generated = torch.tensor(self._generated, dtype=torch.int64)
        if params.repetition_penalty != 1.0:
            seen = torch.unique(torch.cat((self._prompt, generated)))
            score = shaped[seen]
            factor = params.repetition_penalty
            shaped[seen] = torch.where(score > 0, score / factor, score * factor)
        if self._generated and (params.frequency_penalty or params.presence_penalty):
            tokens, counts = torch.unique(generated, return_counts=True)
            shaped[tokens] -= params.frequency_penalty * counts + params.presence_penalty
        if len(self._generated) < params.min_tokens:
            others = possible.clone()
            others[self._stop_token_ids] = False
            possible = others if bool(others.any()) else possible
        return shaped.clamp_(-DOUBLE_MAX, DOUBLE_MAX).masked_fill_(~possible, float("-inf"))

    def _draw(self, shaped: Tensor) -> int:
        if self.params.temperature == 0.0:
            return int(torch.argmax(shaped))
        index, weights = candidates(shaped, self.params)
        total = torch.cumsum(weights, dim=-1)
        point = torch.rand((), generator=self._generator, dtype=torch.float64) * total[-1]
        place = int(torch.searchsorted(total, point, right=True))
        return int(index[min(place, len(index) - 1)])


def candidates(shaped: Tensor, params: SamplingParams) -> tuple[Tensor, Tensor]:
    """Which tokens a draw at a temperature above 0 can give, the likeliest first, and their probabilities.

    ``shaped`` (vocabulary,) fp64: scores after penalties, at least one above -inf. Returns token ids (kept,) int64 and
    weights (kept,) fp64 that add up to 1, each above 0.
    """
    index = torch.nonzero(shaped > float("-inf"))[:, 0]
    if 0 < params.top_k < len(index):
        threshold = torch.topk(shaped[index], params.top_k).values[-1]
        index = index[shaped[index] >= threshold]  # whatever ties with the last one stays too
    # A stable sort keeps the lowest index first among equals; fp64 keeps the sums exact enough to rank.
    ordered, order = torch.sort(shaped[index], descending=True, stable=True)
    # Below the largest before it is divided: the quotient then overflows to -inf only, a weight of 0.
    weights = torch.softmax((ordered - ordered[0]) / params.temperature, dim=-1)
    keep = weights > 0
    keep &= weights >= params.min_p * weights[0]  # the same before top_p as after it: what top_p leaves out is less
    if params.top_p < 1.0:
        keep[1:] &= torch.cumsum(weights, dim=-1)[:-1] < params.top_p  # the probability of all that is likelier
    weights = weights[keep]
    return index[order[keep]], weights / weights.sum()


class HostSlots:
    """The sampling state of ``slots`` requests, on the host.

    A draw depends on its row of logits, the request its slot was opened with, and the draw's index and position:
    not on the slot, the batch, or what else is drawn.
    """

    def __init__(self, slots: int, vocabulary: int) -> None:
        self._vocabulary = vocabulary
        self._slots: list[Shaping | None] = [None] * slots

    def open(self, slot: int, request: SamplingRequest) -> None:
        """Puts a request into a slot, whatever was there. Raises ``ValueError`` for tokens beyond the vocabulary."""
        self._slots[slot] = Shaping(request, self._vocabulary)

    def allow(self, slot: int, bitmask: Tensor | None) -> None:
        """Which tokens may come next: (ceil(vocabulary / 32),) int32, the lowest bit first; None: any."""
        self._at(slot).allow(bitmask, self._vocabulary)

    def last(self, slot: int) -> int:
        """The token that was last drawn in a slot."""
        return self._at(slot).last

    def draw(self, logits: Tensor, draws: Sequence[Draw]) -> list[Choice]:
        """A token for each row of ``logits`` (rows, vocabulary) fp32 on the CPU."""
        likeliest: list[int] = torch.argmax(logits, dim=-1).tolist()
        rows = [
            _Row(row, token_id, self._at(draw.slot), draw)
            for row, token_id, draw in zip(logits.numpy(), likeliest, draws, strict=True)
        ]
        sampled = [row for row in rows if row.token_id >= 0 and row.state.params.temperature > 0.0]
        found = draw_tokens([RowDraw(row.scores, row.state.params, row.draw.position) for row in sampled])
        for row, token_id in zip(sampled, found, strict=True):
            row.token_id = token_id
        return [row.choice() for row in rows]

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

    def choice(self) -> Choice:
        """Remembers the token in its slot."""
        if self.token_id < 0:
            return Choice(-1, None)
        self.state.accept(self.token_id)
        return report(self.logits, self.likeliest, self.token_id, self.state.params)


def report(logits: Scores, likeliest: int, token_id: int, params: SamplingParams) -> Choice:
    """The token with the log-probabilities that were asked for, of the model's own distribution."""
    if not params.logprobs:
        return Choice(token_id, None)
    top = np.float64(min(logits[likeliest], FINITE_MAX))
    total = float(arithmetic.ln(np.array([_mass(logits, top)], np.float64) * 2.0**-40)[0])

    def logprob(token: int) -> float:
        return float(np.float64(min(logits[token], FINITE_MAX)) - top) - total

    most = min(params.top_logprobs, len(logits))
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
