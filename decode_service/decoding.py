"""Decode steps: from the running sequences to one more token each.

While every row takes the argmax, and the device runs by itself, step n + 1 is begun before the tokens of step n are
read: the device feeds the tokens into the next step, and the host plans and delivers meanwhile. Otherwise, as where a
row is sampled on the host, a step is waited for at once.

    host     begin 1 | begin 2, read 1, deliver 1 | begin 3, read 2, deliver 2 | ...
    device   ....... step 1 ............ step 2 ............ step 3

A sequence that ends with token n (a stop token, an abort) is in step n + 1 already: what that step gives it is dropped.
Its pages may have a new owner by then; the owner's writes come later on the same stream.
"""

from __future__ import annotations

from collections.abc import Sequence as Items
from dataclasses import dataclass

from torch import Tensor

from decode_service.metrics import DecodeMetrics
from decode_service.sequence import Sequence
from engine.kv.resident import ResidentChunks
from engine.plan import CascadePlan, StepSequence
from engine.run.protocol import PendingStep, Runner
from engine.sampling.params import Choice


@dataclass(frozen=True)
class NextToken:
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


@dataclass(frozen=True)
class _Begun:
    batch: list[Sequence]
    step: PendingStep


class Decoding:
    """The loop of decode steps. Belongs to the device thread."""

    def __init__(self, runner: Runner, residents: ResidentChunks, metrics: DecodeMetrics) -> None:
        self._runner = runner
        self._residents = residents
        self._metrics = metrics
        self._in_flight: _Begun | None = None

    def step(self, running: Items[Sequence]) -> list[NextToken]:
        """Begins a step for ``running``; the tokens that are there now, perhaps of the step before."""
        if self._runner.runs_ahead and all(takes_argmax(sequence) for sequence in running):
            before = self._in_flight
            self._in_flight = self._begin(running, before)
            return self._read(before)
        return self.drain() if self._in_flight else self._read(self._begin(running, None))

    def drain(self) -> list[NextToken]:
        """The tokens of what was begun and not yet read; nothing is in flight afterwards."""
        before, self._in_flight = self._in_flight, None
        return self._read(before)

    def _begin(self, running: Items[Sequence], before: _Begun | None) -> _Begun | None:
        """The next step, without the sequences whose last token is on its way."""
        rows = {id(sequence): row for row, sequence in enumerate(before.batch)} if before else {}
        batch = [s for s in running if len(s.generated) + (id(s) in rows) < s.params.max_tokens]
        if not batch:
            return None
        sources = [~rows[id(s)] if id(s) in rows else s.generated[-1] for s in batch]
        step = self._runner.decode(sources, step_sequences(batch, self._residents))
        advance(batch, step.plan, self._residents.pool.page_size)
        return _Begun(batch, step)

    def _read(self, begun: _Begun | None) -> list[NextToken]:
        if begun is None:
            return []
        token_ids = begun.step.wait()
        logits = None if all(takes_argmax(s) for s in begun.batch) else begun.step.logits().cpu()
        tokens = [
            NextToken(sequence, token_ids[row])
            if logits is None or takes_argmax(sequence)
            else NextToken(sequence, None, logits[row])
            for row, sequence in enumerate(begun.batch)
            if not sequence.done
        ]
        self._metrics.stepped(begun.step.plan, [token.sequence for token in tokens])
        return tokens


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
        if sequence.tail_level is None:
            sequence.tail_level = len(plan.levels)
            for chunk in sequence.composition.chunks:
                chunk.level = plan.level_of(chunk.held.first_slot(page_size), row)
