"""Decode steps: from the running sequences to one more token each.

``Stepwise`` waits for every step. ``Pipelined`` launches step n + 1 before it reads the tokens of step n: the device
feeds the sampled tokens into the next step itself, and the host plans and delivers while it runs.

    host     launch 1 | launch 2, read 1, deliver 1 | launch 3, read 2, deliver 2 | ...
    device   ........ step 1 ............. step 2 ............. step 3

A sequence that ends with token n (a stop token, an abort) is in step n + 1 already: what that step gives it is dropped.
Its pages may have a new owner by then; the owner's writes come later on the same stream.
"""

from __future__ import annotations

from collections.abc import Sequence as Items
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from torch import Tensor

from decode_service.metrics import DecodeMetrics
from decode_service.sequence import Sequence
from engine.kv.resident import ResidentChunks
from engine.plan import CascadePlan, StepSequence
from engine.run.eager.runner import ModelRunner
from engine.sampling.params import Choice


class TokensToCome(Protocol):
    """The greedy tokens of a step that may still run."""

    def wait(self) -> list[int]:
        """One token id for each row of the step."""


@runtime_checkable
class LaunchingRunner(Protocol):
    """A runner whose greedy steps need not be waited for."""

    def launch(self, sources: Items[int], sequences: Items[StepSequence]) -> tuple[TokensToCome, CascadePlan]:
        """``sources[i]`` is a token id, or ``~row`` for the token that the step before this one samples in that row."""


@dataclass(frozen=True)
class Drawn:
    """What a step has for one sequence: a greedy token, or the logits (vocabulary,) to draw from."""

    sequence: Sequence
    token_id: int | None
    logits: Tensor | None = None

    def choose(self) -> Choice:
        """The sequence's next token. Raises what its sampler raises."""
        if self.token_id is not None:
            return self.sequence.sampler.accept(self.token_id)
        assert self.logits is not None
        return self.sequence.sampler.choose(self.logits)


class Decoding(Protocol):
    """One way of running decode steps. Belongs to the device thread."""

    def step(self, running: Items[Sequence]) -> list[Drawn]:
        """Runs or launches a step for ``running``; the tokens that are there now, perhaps of an earlier step."""

    def drain(self) -> list[Drawn]:
        """The tokens of what was launched and not yet read; nothing is in flight afterwards."""


class Stepwise:
    """Each step is waited for; works with every runner and every kind of sampling."""

    def __init__(self, runner: ModelRunner, residents: ResidentChunks, metrics: DecodeMetrics) -> None:
        self._runner = runner
        self._residents = residents
        self._metrics = metrics

    def step(self, running: Items[Sequence]) -> list[Drawn]:
        batch = list(running)
        steps = step_sequences(batch, self._residents)
        logits, plan = self._runner.decode([sequence.generated[-1] for sequence in batch], steps)
        advance(batch, plan, self._residents.pool.page_size)
        self._metrics.stepped(plan, batch)
        greedy = logits.argmax(dim=-1).tolist()
        rows = None if all(takes_argmax(sequence) for sequence in batch) else logits.cpu()
        return [
            Drawn(sequence, greedy[row]) if rows is None or takes_argmax(sequence) else Drawn(sequence, None, rows[row])
            for row, sequence in enumerate(batch)
        ]

    def drain(self) -> list[Drawn]:
        return []


@dataclass(frozen=True)
class _Launched:
    batch: list[Sequence]
    plan: CascadePlan
    tokens: TokensToCome


class Pipelined:
    """Launches ahead while every running sequence takes the argmax; steps one by one otherwise."""

    def __init__(
        self, runner: LaunchingRunner, stepwise: Stepwise, residents: ResidentChunks, metrics: DecodeMetrics
    ) -> None:
        self._runner = runner
        self._stepwise = stepwise
        self._residents = residents
        self._metrics = metrics
        self._launched: _Launched | None = None

    def step(self, running: Items[Sequence]) -> list[Drawn]:
        if not all(takes_argmax(sequence) for sequence in running):
            return self.drain() if self._launched else self._stepwise.step(running)
        before = self._launched
        self._launched = self._launch(running, before)
        return self._read(before)

    def drain(self) -> list[Drawn]:
        before, self._launched = self._launched, None
        return self._read(before)

    def _launch(self, running: Items[Sequence], before: _Launched | None) -> _Launched | None:
        """The next step, without the sequences whose last token is on its way."""
        rows = {id(sequence): row for row, sequence in enumerate(before.batch)} if before else {}
        batch = [s for s in running if len(s.generated) + (id(s) in rows) < s.params.max_tokens]
        if not batch:
            return None
        sources = [~rows[id(s)] if id(s) in rows else s.generated[-1] for s in batch]
        tokens, plan = self._runner.launch(sources, step_sequences(batch, self._residents))
        advance(batch, plan, self._residents.pool.page_size)
        return _Launched(batch, plan, tokens)

    def _read(self, launched: _Launched | None) -> list[Drawn]:
        if launched is None:
            return []
        token_ids = launched.tokens.wait()
        drawn = [Drawn(s, token) for s, token in zip(launched.batch, token_ids, strict=True) if not s.done]
        self._metrics.stepped(launched.plan, [d.sequence for d in drawn])
        return drawn


def make_decoding(runner: ModelRunner, residents: ResidentChunks, metrics: DecodeMetrics) -> Decoding:
    """Pipelined where the runner can launch, stepwise elsewhere."""
    stepwise = Stepwise(runner, residents, metrics)
    if isinstance(runner, LaunchingRunner):
        return Pipelined(runner, stepwise, residents, metrics)
    return stepwise


def takes_argmax(sequence: Sequence) -> bool:
    """Whether a sequence's next token is the argmax of the logits, and nothing else is asked of them."""
    return sequence.params.plain_greedy and not sequence.params.logprobs


def step_sequences(batch: Items[Sequence], residents: ResidentChunks) -> list[StepSequence]:
    """One row for each sequence, behind what its tail holds."""
    page_size, moves = residents.pool.page_size, residents.moves
    return [
        StepSequence(
            sequence.placed(page_size, moves),
            sequence.tail_pages,
            sequence.tail_tokens,
            1,
            sequence.composition.tail_start + sequence.tail_tokens,
        )
        for sequence in batch
    ]


def advance(batch: Items[Sequence], plan: CascadePlan, page_size: int) -> None:
    """The step's tokens are in the tails; at its first step a sequence learns in which level each chunk is read."""
    for row, sequence in enumerate(batch):
        sequence.tail_tokens += 1
        if not sequence.levels and sequence.chunks:
            sequence.levels = [plan.level_of(chunk.first_slot(page_size), row) for chunk in sequence.chunks]
            sequence.tail_level = len(plan.levels)
