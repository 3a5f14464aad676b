"""PackedRunner: the runner of CUDA, with captured steps over fused layers or over a model's own code.

    chunks of more than LONG tokens     pieces of their own: one eager forward, library attention (prefill_attention.py)
    everything else                     rows of packed steps over the cascade kernels             (steps.py)

Where every product, norm and attention gives a row what follows from that row alone, rows of packed steps have the same
bits in any company, cut anywhere, computed as a chunk, as a prompt or one at a time by decoding. Library attention
rounds otherwise: which way a chunk takes follows from its own length alone. Where a row's bits may follow from how many
rows there are (``together`` is False), chunks and prompts are pieces of their own, cut where they are cut always, and
only rows that decode share steps. ``begin`` returns before the step has run, and the next one may name the slots whose
tokens it draws: the device feeds them into it.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from engine.device import on_pools_device
from engine.plan import CascadePlan
from engine.run.cuda.buckets import buckets_up_to, draw_rows
from engine.run.cuda.captured import compile_kernels
from engine.run.cuda.cascade.tuning import Tuning
from engine.run.cuda.launched import LaunchedStep
from engine.run.cuda.long_piece import LongPieces
from engine.run.cuda.packed import Forward
from engine.run.cuda.prefill_attention import Block
from engine.run.cuda.products import BUCKETS
from engine.run.cuda.sampling.slots import DeviceSlots
from engine.run.cuda.steps import StepLimits, Steps
from engine.run.planning import CASCADE_LEVELS_MAX, StepPlanner
from engine.run.protocol import AttentionWatch, LayerWatch, StepRows
from engine.run.room import NO_LIMIT, READS_WHILE_DECODING, StepRoom
from engine.sampling.params import Draw, SamplingRequest, Scored
from engine.sampling.scoring import PendingScores
from engine.sampling.shaping import Bits

log = logging.getLogger(__name__)

LONG = 4096  # tokens of the longest chunk that goes into packed steps
ROWS_MAX = 1024  # of a packed step: products run at 57k rows/s there, at 50k with half of it
SLOTS = 64


class PackedRunner:
    """Forwards over one pool on CUDA.

    ``piece_tokens`` is the most rows of a piece of its own, ``slots`` how many sequences draw at once. Packed steps
    have up to ``rows_max`` rows, or as many as slots, padded to one of ``row_buckets``; chunks of more than
    ``long_chunk`` tokens run in pieces, as does every prompt unless rows may run ``together``. What library attention
    does not know is computed in steps, pieces too, which then have no more rows than a step. ``block`` is what
    computes a block of a piece's keys, torch's kernels unless told otherwise. Raises ``ValueError`` for more slots than
    rows.
    """

    def __init__(
        self,
        forward: Forward[Any, Any],
        *,
        piece_tokens: int = 8192,
        slots: int = SLOTS,
        rows_max: int = ROWS_MAX,
        row_buckets: Sequence[int] = BUCKETS,
        long_chunk: int = LONG,
        max_cascade_levels: int = CASCADE_LEVELS_MAX,
        limits: StepLimits | None = None,
        tuning: Tuning | None = None,
        graphs: bool = True,
        together: bool = True,
        block: Block | None = None,
    ) -> None:
        pool = forward.pool
        self.pool = pool
        self.forward = forward
        self.runs_ahead = True
        self.slots = slots
        self._long_chunk = long_chunk
        self._graphs = graphs
        self._together = together
        self._planner = StepPlanner(pool, max_cascade_levels)
        buckets = buckets_up_to(max(rows_max, slots), row_buckets)
        draws = draw_rows(buckets, slots)
        self._sampling = DeviceSlots(forward.vocabulary, slots=slots, rows=draws, device=pool.device)
        self.steps = Steps(
            forward, self._sampling, buckets=buckets, draws=draws, limits=limits, tuning=tuning, graphs=graphs
        )
        self.piece_tokens = min(piece_tokens, self.steps.rows) if forward.piece_refusal else piece_tokens
        self._pieces = (
            None if forward.piece_refusal else LongPieces(forward, self._sampling.last, rows=piece_tokens, block=block)
        )

    def watch_attention(self, watch: AttentionWatch) -> None:
        if self._graphs:
            raise ValueError("watch_attention: a captured step calls nothing; make the runner with graphs=False")
        self.steps.watch = watch.after
        if self._pieces is not None:
            self._pieces.watch = watch.after

    @contextmanager
    def watching_layers(self, watch: LayerWatch) -> Iterator[None]:
        self.forward.watch = watch
        try:
            yield
        finally:
            self.forward.watch = None

    @on_pools_device
    def prepare(self) -> None:
        """Compiles and captures what serving needs, so that nothing of the kind happens in traffic."""
        began = time.perf_counter()
        with torch.inference_mode():
            launches = [*self.steps.first_launches(), *([] if self._pieces is None else [self._pieces.prepare])]
            compile_kernels(self.pool.device, launches)
            compiled = time.perf_counter()
            self.steps.prepare()
        took = compiled - began, time.perf_counter() - compiled
        log.info("compiled kernels in %.1f s, captured %d graphs in %.1f s", took[0], self.steps.graphs, took[1])

    def alone(self, tokens: int, *, chunk: bool) -> bool:
        return not self._together or (chunk and tokens > self._long_chunk and self._pieces is not None)

    def room(self, *, decoding: bool) -> StepRoom:
        """Of partial results a row that is nobody's takes one; lists that grow for decode rows make room for slices."""
        splits = self.steps.splits
        return StepRoom(
            self.steps.rows,
            partials=self.steps.limits.partials - self.steps.rows,
            reads=READS_WHILE_DECODING if decoding else NO_LIMIT,
            chunk_splits=splits.chunk,
            tail_split=splits.tail,
        )

    @on_pools_device
    @torch.inference_mode()
    def open(self, slot: int, request: SamplingRequest) -> None:
        self._check_slot(slot)
        self._sampling.open(slot, request)

    def bitmasks(self, count: int) -> Bits:
        return self._sampling.bitmasks(count)

    @on_pools_device
    @torch.inference_mode()
    def begin(self, batch: Sequence[StepRows]) -> LaunchedStep:
        plan = self._planner.plan(batch, piece_tokens=self.piece_tokens)
        sources: list[int] = []
        drawn: list[int] = []
        draws: list[Draw] = []
        scored: list[tuple[int, Scored]] = []
        for rows in batch:
            if rows.scored is not None:
                scored.append((len(sources), rows.scored))
            sources += rows.sources
            drawn += [len(sources) - 1] * len(rows.draws)
            draws += rows.draws
        self._check_slot(max(~min(sources), *[draw.slot for draw in draws]) if draws else ~min(sources))
        if batch[0].alone:
            return self._alone(batch[0], plan)
        wanted = len(draws) + sum(len(each.rows) for _, each in scored)
        if wanted > self.slots:
            raise ValueError(f"begin: {wanted} rows to draw from or to score, there are {self.slots} slots")
        return self.steps.launch(plan, sources, drawn, draws, scored)

    def _alone(self, rows: StepRows, plan: CascadePlan) -> LaunchedStep:
        """A forward of a piece; what is drawn behind it is drawn by a step of its last row, or of all its rows."""
        if rows.draw is not None and self._together:
            raise ValueError("begin: a piece that runs alone is a chunk's, behind which nothing is drawn")
        if self._pieces is None:
            return self._by_steps(rows, plan)
        scores = self._pieces.launch(plan, rows.sources, rows.scored)
        if rows.draw is None:
            return LaunchedStep(plan, self.pool.device, None, _no_logits, scores=scores)
        sequence, before = rows.sequence, rows.sequence.rows - 1
        last = replace(sequence, tail_tokens=sequence.tail_tokens + before, rows=1, position=sequence.position + before)
        own = self._planner.plan([StepRows(last, rows.sources[-1:])], piece_tokens=self.piece_tokens)
        return self.steps.launch(own, rows.sources[-1:], [0] * len(rows.draws), rows.draws).told(plan, scores)

    def _by_steps(self, rows: StepRows, plan: CascadePlan) -> LaunchedStep:
        """The same step again for all that is scored, as many rows at a time as there are places; drawn by the last."""
        scores: list[PendingScores] = []
        blocks = [] if rows.scored is None else rows.scored.blocks(self.slots)
        for some, wanted in blocks:
            part = Scored(tuple((some[place], token) for place, token in wanted), rows.scored.top if rows.scored else 0)
            scores += self.steps.launch(plan, rows.sources, [], [], [(0, part)]).pending_scores
        if blocks and rows.draw is None:
            return LaunchedStep(plan, self.pool.device, None, _no_logits, scores=scores)
        drawn = [len(rows.sources) - 1] * len(rows.draws)
        return self.steps.launch(plan, rows.sources, drawn, rows.draws).told(plan, scores)

    def _check_slot(self, slot: int) -> None:
        if slot >= self.slots:
            raise ValueError(f"slot: {slot} is none of 0 .. {self.slots - 1}")


def _no_logits() -> Tensor:
    raise RuntimeError("logits: a piece of a chunk has none")
