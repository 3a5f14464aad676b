"""EagerRunner: forwards through the model's own code with our attention, on any device.

A chunk and a prompt's tail are computed in pieces of their own. A decode step is one row a sequence, padded to a
bucket; its tokens are drawn, and waited for, when it has begun, so nothing runs ahead.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor

from engine.attention import Attention, Scores
from engine.device import on_pools_device
from engine.kv.pool import PagedKVPool
from engine.model.borrowed import Blocks, BorrowedModel
from engine.plan import CascadePlan
from engine.run.planning import CASCADE_LEVELS_MAX, DECODE_BUCKETS, StepPlanner, padded_to
from engine.run.protocol import AttentionWatch, DrawnStep, LayerWatch, StepRows
from engine.run.room import StepRoom
from engine.sampling.params import Choice, Draw, SamplingRequest, Scored
from engine.sampling.sampler import HostSlots
from engine.sampling.scoring import ROWS_AT_ONCE, PendingScores, begin_scoring
from engine.sampling.shaping import Bits


class Slots(Protocol):
    """Sampling state by slot, and tokens drawn by it."""

    def open(self, slot: int, request: SamplingRequest) -> None: ...

    def last(self, slot: int) -> int: ...

    def bitmasks(self, count: int) -> Bits: ...

    def masked(self, slot: int) -> bool: ...

    def allow(self, slots: Sequence[int], bitmasks: Bits) -> None: ...

    def draw(self, logits: Tensor, draws: Sequence[Draw]) -> list[Choice]: ...


def drawn_step(slots: Slots, plan: CascadePlan, logits: Tensor, draws: Sequence[Draw]) -> DrawnStep:
    """A step whose logits (draws, vocabulary) are there: drawn, unless some of its draws are told what may come."""
    masked = [draw.slot for draw in draws if slots.masked(draw.slot)]
    if not masked:
        return DrawnStep(plan, logits, slots.draw(logits, draws) if draws else [])

    def draw(bitmasks: Bits) -> Sequence[Choice]:
        slots.allow(masked, bitmasks)
        return slots.draw(logits, draws)

    return DrawnStep(plan, logits, make=draw)


class EagerRunner:
    """The ``Runner`` of every model; ``row_multiple`` is what reads of a decode step of several rows are padded to.

    ``make_slots(slots, vocabulary)`` gives what draws, on the host unless told otherwise.
    """

    def __init__(
        self,
        borrowed: BorrowedModel,
        pool: PagedKVPool,
        attention: Attention[Any],
        *,
        piece_tokens: int = 512,
        decode_buckets: Sequence[int] = DECODE_BUCKETS,
        row_multiple: int = 4,
        max_cascade_levels: int = CASCADE_LEVELS_MAX,
        make_slots: Callable[[int, int], Slots] = HostSlots,
    ) -> None:
        self.borrowed = borrowed
        self.pool = pool
        self.attention = attention
        self.piece_tokens = piece_tokens
        self.row_multiple = row_multiple
        self.runs_ahead = False
        self._buckets = tuple(sorted(decode_buckets))
        self.slots = self._buckets[-1]
        self._planner = StepPlanner(pool, max_cascade_levels)
        self._sampling = make_slots(self.slots, int(borrowed.config.get_text_config().vocab_size))

    def watch_attention(self, watch: AttentionWatch) -> None:
        self.attention = watch.around(self.attention)

    def watching_layers(self, watch: LayerWatch) -> AbstractContextManager[None]:
        return self.borrowed.watching_layers(watch)

    def prepare(self) -> None:
        """There is nothing of the kind here."""

    def alone(self, tokens: int, *, chunk: bool) -> bool:
        return True

    def room(self, *, decoding: bool) -> StepRoom:
        return StepRoom(self._buckets[-1])

    def open(self, slot: int, request: SamplingRequest) -> None:
        self._sampling.open(slot, request)

    def bitmasks(self, count: int) -> Bits:
        return self._sampling.bitmasks(count)

    def begin(self, batch: Sequence[StepRows]) -> DrawnStep:
        plan = self._planner.plan(batch, piece_tokens=self.piece_tokens)
        sources = [source for rows in batch for source in rows.sources]
        # A slot in which no number was drawn holds -1: the row that takes it is nobody's.
        ids = [max(0, self._sampling.last(~source)) if source < 0 else source for source in sources]
        scores: list[PendingScores] = []
        logits = self._piece(ids, plan, batch[0].scored, scores) if batch[0].alone else self._decode(ids, batch, plan)
        drawn = [(row, draw) for row, rows in enumerate(batch) for draw in rows.draws]
        if len(drawn) != len(logits):
            logits = logits[[row for row, _ in drawn]]
        return replace(drawn_step(self._sampling, plan, logits, [draw for _, draw in drawn]), scored=scores)

    def _piece(self, ids: list[int], plan: CascadePlan, scored: Scored | None, scores: list[PendingScores]) -> Tensor:
        """Logits (1, vocabulary) of the last row; ``scores`` takes what is ``scored``."""
        blocks = self._blocks([] if scored is None else [(0, scored)], scores)
        return self._forward(ids, plan, [len(ids) - 1], row_multiple=1, blocks=blocks)

    def _blocks(self, scored: Sequence[tuple[int, Scored]], scores: list[PendingScores]) -> Blocks:
        """Rows whose logits are looked at and forgotten; ``scored`` begin at rows of the step each."""
        return [
            (torch.tensor(rows, device=self.pool.device) + first, partial(_score, scores, wanted, each.top))
            for first, each in scored
            for rows, wanted in each.blocks(ROWS_AT_ONCE)
        ]

    def _decode(self, ids: list[int], batch: Sequence[StepRows], plan: CascadePlan) -> Tensor:
        """Logits (rows, vocabulary)."""
        if len(ids) != len(batch) or any(rows.scored for rows in batch):
            raise ValueError(f"begin: {len(ids)} rows of {len(batch)} sequences; several rows of one are a piece alone")
        padded = padded_to(plan, self._buckets, self.pool)
        rows = len(padded.slots)
        ids = [*ids, *[0] * (rows - len(ids))]
        # The head runs on the padded rows too: one row fewer could be another kernel, and other bits.
        logits = self._forward(ids, padded, list(range(rows)), row_multiple=1 if rows == 1 else self.row_multiple)
        return logits[: len(batch)]

    @on_pools_device
    def _forward(
        self, token_ids: Sequence[int], plan: CascadePlan, rows: list[int], *, row_multiple: int, blocks: Blocks = ()
    ) -> Tensor:
        device = self.pool.device
        step = self.attention.prepare(plan, row_multiple=row_multiple)

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor, scores: Scores) -> Tensor:
            return self.attention.attend(step, layer, q, k, v, scores)

        return self.borrowed.forward(
            torch.tensor(token_ids, device=device),
            torch.tensor(plan.positions, device=device),
            attend,
            torch.tensor(rows, device=device),
            blocks,
        )


def _score(scores: list[PendingScores], wanted: Sequence[tuple[int, int]], top: int, logits: Tensor) -> None:
    scores.append(begin_scoring(logits, wanted, top))
