"""Pieces of long chunks: one eager forward each over library attention, beside the packed steps on the same stream.

Nothing waits: a piece may be begun between two steps that run ahead.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from engine.plan import CascadePlan, PlacedChunk, StepSequence, plan_levels, plan_step
from engine.run.cuda.cascade.tuning import RotationTable
from engine.run.cuda.inputs import InputRing
from engine.run.cuda.packed import Forward
from engine.run.cuda.prefill_attention import Block, attend_piece, prepare_piece
from engine.run.cuda.products import ROWS_MAX
from engine.run.cuda.steps import CallWatch
from engine.sampling.params import Scored
from engine.sampling.scoring import ROWS_AT_ONCE, PendingScores, begin_scoring


class LongPieces:
    """Forwards of at most ``rows`` rows of one chunk, whose context stands where it was computed.

    ``last`` is where sources that name a slot look; ``block`` is what computes a block of keys, torch's kernels unless
    told otherwise. Buffers of that many rows are made with the first piece.
    """

    def __init__(self, forward: Forward[Any, Any], last: Tensor, *, rows: int, block: Block | None = None) -> None:
        self.forward = forward
        self.watch: CallWatch | None = None
        self._last = last
        self._rows = rows
        self._block = block
        self._inputs: Any = None
        self._ring: InputRing | None = None
        self._drawn: Any = None  # made with the first that is scored

    def launch(self, plan: CascadePlan, sources: Sequence[int], scored: Scored | None = None) -> list[PendingScores]:
        """Begins to compute the keys and values of a plan of one sequence, and what is ``scored`` of its rows.

        Raises ``ValueError`` for moved context that the forward's queries cannot be turned back to.
        """
        moved = any(any(read.offsets) for read in plan.reads)
        if moved and not self.forward.call(0).turned:
            raise ValueError("begin: the context of a piece that runs alone stands at its computed places")
        inputs, ring = self._made()
        forward, pool = self.forward, self.forward.pool
        step = prepare_piece(plan, pool.page_size, pool.device)
        ring.send(sources, plan.positions, plan.slots)

        def attend(layer: int, q: Tensor, turned: Tensor, out: Tensor) -> None:
            call = forward.call(layer)
            queries = partial(_turned_back, call.rotation, turned)
            attend_piece(step, queries, pool.keys[layer], pool.values[layer], call.scores.scaling, out, self._block)
            if self.watch is not None:
                self.watch(plan, layer, q, out, call.scores, call.turned)

        scores: list[PendingScores] = []
        heads = [] if scored is None else self._heads(len(sources), scored, scores)
        forward.layers(inputs.first(len(sources)), self._last, attend, turn=True, drawn=heads)
        return scores

    def _heads(self, rows: int, scored: Scored, scores: list[PendingScores]) -> Iterator[Any]:
        """What is scored of a piece's rows, some at a time; ``scores`` takes what comes of them when the next are asked
        for."""
        device = self.forward.pool.device
        if self._drawn is None:
            index = torch.zeros(min(self._rows, ROWS_AT_ONCE), dtype=torch.int32, device=device)
            self._drawn = self.forward.outputs(index)
        drawn = self._drawn.first(min(rows, len(self._drawn.rows)))
        size = len(drawn.rows)
        for some, wanted in scored.blocks(size):  # always as many rows: the rest are the first row again
            index = torch.tensor(some + some[:1] * (size - len(some)), dtype=torch.int32)
            drawn.rows.copy_(index.pin_memory() if device.type == "cuda" else index, non_blocking=True)
            yield drawn
            scores.append(begin_scoring(drawn.logits[: len(some)], wanted, scored.top))

    def prepare(self) -> None:
        """Compiles the kernels of pieces, on the scratch page: folding results of one chunk and of several."""
        pool = self.forward.pool
        # Triton compiles apart what is a multiple of 16, and more rows than a step has may have kernels of their own.
        for rows in (pool.page_size, pool.page_size - 1, ROWS_MAX + 1):
            rows = min(rows, self._rows)
            for chunks in (1, 3):
                behind = min(rows, pool.page_size)
                context = (PlacedChunk(pool.scratch_page * pool.page_size, behind, 0, 0),) * chunks
                pages = (pool.scratch_page,) * -(-rows // pool.page_size)
                sequence = StepSequence(context, pages, 0, rows, 0)
                plan = plan_step([sequence], plan_levels([sequence], max_cascade_levels=1), page_size=pool.page_size)
                self.launch(plan, [0] * rows)

    def _made(self) -> tuple[Any, InputRing]:
        if self._inputs is None or self._ring is None:
            given = torch.zeros(3, self._rows, dtype=torch.int32, device=self.forward.pool.device)
            sources, positions, slots = given
            made = self.forward.inputs(self._rows)
            self._inputs = replace(made, sources=sources, positions=positions, slots=slots)
            self._ring = InputRing(given)
        return self._inputs, self._ring


def _turned_back(table: RotationTable | None, q: Tensor, offset: int) -> Tensor:
    return q if offset == 0 or table is None else table.turned_back(q, offset)
