"""A real model whose rows share steps on the CPU: the eager runner with what its attention can do anyway."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from engine.kv.pool import PagedKVPool
from engine.run.choice import make_attention
from engine.run.eager.runner import EagerRunner, drawn_step
from engine.run.protocol import DrawnStep, StepRows
from engine.run.room import StepRoom
from engine.sampling.scoring import PendingScores
from engine.served import ServedModel
from serving.process.loading import Loaded

STEP_ROWS = 40


class PackingRunner(EagerRunner):
    """Rows of any requests in steps of ``STEP_ROWS``, read when the next one has begun."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.runs_ahead = True
        self.mixed = 0  # steps of rows that decode beside several of one prompt

    def alone(self, tokens: int, *, chunk: bool) -> bool:
        return False

    def room(self, *, decoding: bool) -> StepRoom:
        return StepRoom(STEP_ROWS)

    def begin(self, batch: Sequence[StepRows]) -> DrawnStep:
        plan = self._planner.plan(batch, piece_tokens=0)
        counts = [len(rows.sources) for rows in batch]
        assert sum(counts) <= STEP_ROWS
        self.mixed += batch[0].sources[0] < 0 and max(counts) > 1
        ids = [self._sampling.last(~source) if source < 0 else source for rows in batch for source in rows.sources]
        last = [sum(counts[: row + 1]) - 1 for row, rows in enumerate(batch) for _ in rows.draws]
        scored = [(sum(counts[:row]), rows.scored) for row, rows in enumerate(batch) if rows.scored is not None]
        assert len(last) + sum(len(each.rows) for _, each in scored) <= self.slots
        scores: list[PendingScores] = []
        blocks = self._blocks(scored, scores)
        logits = self._forward(ids, plan, last or [0], row_multiple=1, blocks=blocks)[: len(last)]
        step = drawn_step(self._sampling, plan, logits, [draw for rows in batch for draw in rows.draws])
        return replace(step, scored=scores)


class PackingModel(ServedModel):
    def make_runner(self, pool: PagedKVPool, **options: Any) -> Any:
        attention = make_attention(pool, self.borrowed, self.findings)
        slots = {name: options[name] for name in ("decode_buckets", "max_cascade_levels")}
        return PackingRunner(self.borrowed, pool, attention, piece_tokens=self.piece_tokens, **slots)


def packing(model: Loaded) -> Loaded:
    """The model with a runner that packs."""
    fields = {field.name: getattr(model.served, field.name) for field in dataclasses.fields(ServedModel)}
    return dataclasses.replace(model, served=PackingModel(**fields))
