"""What a caller asks of sampling, and what it gets: plain values, no tensors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

SEED_MAX = 2**63 - 1
BIAS_MAX = 100.0
BIASES_MAX = 1024
TOP_LOGPROBS_MAX = 20


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
    top_logprobs: int = 0
    logit_bias: tuple[tuple[int, float], ...] = ()  # token id, what is added to its score

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
            ("top_logprobs", 0 <= self.top_logprobs <= TOP_LOGPROBS_MAX, f"in 0..{TOP_LOGPROBS_MAX}"),
            ("top_logprobs", self.logprobs or not self.top_logprobs, "0 without logprobs"),
        )
        for name, holds, remedy in checks:
            if not holds:  # False for NaN too
                found = (
                    "" if name == "stop" else f"{getattr(self, name)!r} "
                )  # stop strings are the caller's own affair
                raise ValueError(f"sampling.{name}: {found}must be {remedy}")
        self._check_bias()

    def _check_bias(self) -> None:
        if len(self.logit_bias) > BIASES_MAX:
            raise ValueError(f"sampling.logit_bias: {len(self.logit_bias)} tokens must be at most {BIASES_MAX}")
        if len({token for token, _ in self.logit_bias}) < len(self.logit_bias):
            raise ValueError("sampling.logit_bias: a token must be named once")
        for token, bias in self.logit_bias:
            if token < 0 or not -BIAS_MAX <= bias <= BIAS_MAX:
                raise ValueError(
                    f"sampling.logit_bias: {bias!r} for token {token} must be in -{BIAS_MAX:g}..{BIAS_MAX:g}, "
                    "the token 0 or more"
                )

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
            and not self.logit_bias
        )

    @property
    def penalises(self) -> bool:
        """Whether what was said before changes the scores."""
        return self.repetition_penalty != 1.0 or self.frequency_penalty != 0.0 or self.presence_penalty != 0.0


@dataclass(frozen=True)
class Choice:
    """A picked token and, if asked for, log-probabilities under the model's own distribution.

    ``token_id`` is -1 if the model gave no number to choose by: NaN, or -inf for every token that may come.
    ``top``: the likeliest tokens and their log-probabilities, the likeliest first, of equals the lowest id.
    """

    token_id: int
    logprob: float | None
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True)
class Draw:
    """A token that is to be drawn behind the last of a sequence's rows.

    ``slot``: where its sampling state was opened; ``index``: tokens of the answer that were drawn before it;
    ``position``: absolute position that the drawn token will have (tokens of composition and answer before it).
    """

    slot: int
    index: int
    position: int


@dataclass(frozen=True)
class Scored:
    """Of which tokens the log-probabilities behind a sequence's rows are wanted, under the model's own distribution.

    ``wanted``: row and token, the rows counted from the sequence's first one, ascending; a row may come several times.
    ``top``: so many of the likeliest tokens with each.
    """

    wanted: tuple[tuple[int, int], ...]
    top: int = 0

    @property
    def rows(self) -> list[int]:
        """Each row once, ascending."""
        return list(dict.fromkeys(row for row, _ in self.wanted))

    def blocks(self, rows_max: int) -> list[tuple[list[int], list[tuple[int, int]]]]:
        """At most so many rows at once, ascending, and what is wanted of them: place among these rows, and token."""
        rows = self.rows
        found: list[tuple[list[int], list[tuple[int, int]]]] = []
        for first in range(0, len(rows), rows_max):
            places = {row: place for place, row in enumerate(rows[first : first + rows_max])}
            found.append((list(places), [(places[row], token) for row, token in self.wanted if row in places]))
        return found


@dataclass(frozen=True)
class SamplingRequest:
    """What a sampling slot is opened with.

    ``prompt``: the tokens that ``repetition_penalty`` counts besides the answer's. ``stop_token_ids``: those of
    ``stops_at`` that the vocabulary has. ``generated``: the tokens of an answer that is resumed. ``masked``: which
    tokens may come is told before each draw (``PendingStep.draw``).
    """

    params: SamplingParams
    prompt: Sequence[int] = ()
    stop_token_ids: frozenset[int] = frozenset()
    generated: Sequence[int] = ()
    masked: bool = False
