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

from collections.abc import Callable
from collections.abc import Sequence as Items
from dataclasses import dataclass

from torch import Tensor

from decode_service.metrics import DecodeMetrics
from decode_service.sequence import Sequence
from decode_service.step_plan import Rows
from engine.kv.resident import ResidentChunks
from engine.plan import StepSequence
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
class Begun:
    """A step that was launched, and the rows in it."""

    rows: Items[Rows]
    step: PendingStep


class Decoding:
    """The loop of decode steps. Belongs to the device thread."""

    def __init__(
        self, runner: Runner, residents: ResidentChunks, metrics: DecodeMetrics, begun: Callable[[Begun], None]
    ) -> None:
        """``begun`` is told of every step when it is launched."""
        self._runner = runner
        self._residents = residents
        self._metrics = metrics
        self._begun = begun
        self._in_flight: Begun | None = None

    def step(self, rows: Items[Rows]) -> list[NextToken]:
        """Begins a step of ``rows``, one a sequence; the tokens that are there now, perhaps of the step before."""
        if self._runner.runs_ahead and all(takes_argmax(each.sequence) for each in rows):
            before = self._in_flight
            self._in_flight = self._begin(rows, before)
            return self._read(before)
        return self.drain() if self._in_flight else self._read(self._begin(rows, None))

    def drain(self) -> list[NextToken]:
        """The tokens of what was begun and not yet read; nothing is in flight afterwards."""
        before, self._in_flight = self._in_flight, None
        return self._read(before)

    def _begin(self, rows: Items[Rows], before: Begun | None) -> Begun | None:
        """The next step; a sequence that is in the one before gets its input from there."""
        if not rows:
            return None
        at = {each.sequence: row for row, each in enumerate(before.rows)} if before else {}
        batch = [each.sequence for each in rows]
        sources = [~at[sequence] if sequence in at else sequence.generated[-1] for sequence in batch]
        begun = Begun(rows, self._runner.decode(sources, step_sequences(batch, self._residents)))
        self._begun(begun)
        return begun

    def _read(self, begun: Begun | None) -> list[NextToken]:
        if begun is None:
            return []
        token_ids = begun.step.wait()
        batch = [each.sequence for each in begun.rows]
        logits = None if all(takes_argmax(sequence) for sequence in batch) else begun.step.logits().cpu()
        tokens = [
            NextToken(sequence, token_ids[row])
            if logits is None or takes_argmax(sequence)
            else NextToken(sequence, None, logits[row])
            for row, sequence in enumerate(batch)
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
