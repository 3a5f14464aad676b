"""Sampling: from logits to one token, per request, with its own seeded generator.

Neighbours in a batch never change a draw: every request has its own generator and its own row. Ties go to
the lowest index. Parameter names and their meaning are those of the field (temperature, nucleus sampling
arXiv:1904.09751, min-p arXiv:2407.01082, the penalties of OpenAI's API and of CTRL, arXiv:1909.05858).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

SEED_MAX = 2**63 - 1


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
                raise ValueError(f"sampling.{name}: {getattr(self, name)!r} must be {remedy}")

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
        self.params = params
        self._stop_token_ids = sorted(stop_token_ids)
        self._generator = torch.Generator().manual_seed(params.seed)
        self._prompt = torch.tensor(sorted(set(prompt)), dtype=torch.int64)
        self._generated: list[int] = []

    def choose(self, logits: Tensor) -> Choice:
        """Picks from one row of logits (vocabulary,), fp32 on the CPU, and remembers the token."""
        token_id = int(torch.argmax(logits)) if self.params.plain_greedy else self._draw(self._shape(logits.clone()))
        self._generated.append(token_id)
        logprob = float(torch.log_softmax(logits, dim=-1)[token_id]) if self.params.logprobs else None
        return Choice(token_id, logprob)

    def accept(self, token_id: int) -> Choice:
        """Remembers a token that was picked greedily elsewhere (on the device, for a whole batch)."""
        self._generated.append(token_id)
        return Choice(token_id, None)

    def _shape(self, logits: Tensor) -> Tensor:
        """Applies penalties and forbids stopping before ``min_tokens``."""
        params = self.params
        generated = torch.tensor(self._generated, dtype=torch.int64)
        if params.repetition_penalty != 1.0:
            seen = torch.unique(torch.cat((self._prompt, generated)))
            score = logits[seen]
            factor = params.repetition_penalty
            logits[seen] = torch.where(score > 0, score / factor, score * factor)
        if self._generated and (params.frequency_penalty or params.presence_penalty):
            tokens, counts = torch.unique(generated, return_counts=True)
            logits[tokens] -= params.frequency_penalty * counts + params.presence_penalty
        if len(self._generated) < params.min_tokens:
            logits[self._stop_token_ids] = float("-inf")
        return logits

    def _draw(self, logits: Tensor) -> int:
        params = self.params
        if params.temperature == 0.0:
            return int(torch.argmax(logits))
        # A stable sort keeps the lowest index first among equals; fp64 keeps the sums exact enough to rank.
        scaled = logits.double() / params.temperature
        ordered, index = torch.sort(scaled, descending=True, stable=True)
        weights = torch.softmax(ordered, dim=-1)
        keep = torch.ones_like(weights, dtype=torch.bool)
        if params.top_k:
            keep[params.top_k :] = False
        if params.top_p < 1.0:
            keep &= torch.cumsum(weights, dim=-1) - weights < params.top_p
        if params.min_p:
            keep &= weights >= params.min_p * weights[0]
        weights = torch.where(keep, weights, torch.zeros_like(weights))
        total = torch.cumsum(weights, dim=-1)
        point = torch.rand((), generator=self._generator, dtype=torch.float64) * total[-1]
        place = int(torch.searchsorted(total, point, right=True))
        return int(index[min(place, int(keep.nonzero()[-1]))])
