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
from dataclasses import dataclass, field

import torch
from torch import Tensor

SEED_MAX = 2**63 - 1
FINITE_MAX = torch.finfo(torch.float64).max


@dataclass(frozen=True)
class SamplingParams:
    """How to pick tokens and when to stop. Raises ``ValueError`` naming the field that is out of range."""

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    repetition_penalty: float = 1.0
    max_tokens: int = 128
    min_tokens: int = 0
    stop: tuple[str, ...] = ()
    stop_token_ids: frozenset[int] = field(default_factory=frozenset)
    ignore_eos: bool = False
    seed: int = 0
    logprobs: bool = False

    def __post_init__(self) -> None:
        checks = (
            ("temperature", 0.0 <= self.temperature <= 100.0, "in 0..100"),
            ("top_p", 0.0 < self.top_p <= 1.0, "in (0, 1]"),
            ("top_k", self.top_k >= 0, "0 (off) or more"),
            ("min_p", 0.0 <= self.min_p <= 1.0, "in 0..1"),
            ("frequency_penalty", -2.0 <= self.frequency_penalty <= 2.0, "in -2..2"),
            ("presence_penalty", -2.0 <= self.presence_penalty <= 2.0, "in -2..2"),
            ("repetition_penalty", 0.0 < self.repetition_penalty <= 100.0, "above 0, at most 100"),
            ("max_tokens", self.max_tokens >= 1, "at least 1"),
            ("min_tokens", 0 <= self.min_tokens <= self.max_tokens, "in 0..max_tokens"),
            ("seed", 0 <= self.seed <= SEED_MAX, f"in 0..{SEED_MAX}"),
            ("stop", len(self.stop) <= 16 and all(self.stop), "at most 16 strings, none empty"),
        )
        for name, holds, remedy in checks:
            if not holds:  # False for NaN too
                found = (
                    "" if name == "stop" else f"{getattr(self, name)!r} "
                )  # stop strings are the caller's own affair
                raise ValueError(f"sampling.{name}: {found}must be {remedy}")

    def stops_at(self, eos_token_ids: frozenset[int]) -> frozenset[int]:
        """The tokens that end an answer of a model with these end tokens; none may come before ``min_tokens``."""
        return self.stop_token_ids if self.ignore_eos else self.stop_token_ids | eos_token_ids

    @property
    def plain_greedy(self) -> bool:
        """Whether the token is the argmax of the logits as they are."""
        return (
            self.temperature == 0.0
            and self.frequency_penalty == self.presence_penalty == 0.0
            and self.repetition_penalty == 1.0
            and self.min_tokens == 0
        )


@dataclass(frozen=True)
class Choice:
    """A picked token and, if asked for, its log-probability under the model's own distribution."""

    token_id: int
    logprob: float | None


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
