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

import torch
from torch import Tensor

from engine.sampling.params import Choice, SamplingParams

FINITE_MAX = torch.finfo(torch.float64).max


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
        return shaped.clamp_(-FINITE_MAX, FINITE_MAX).masked_fill_(~possible, float("-inf"))

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
