"""Pieces of long chunks: one eager forward each over library attention, beside the packed steps on the same stream.

Nothing waits: a piece may be begun between two steps that run ahead.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from engine.plan import CascadePlan, PlacedChunk, StepSequence, plan_levels, plan_step
from engine.run.cuda.forward import Buffers, FusedForward
from engine.run.cuda.inputs import InputRing
from engine.run.cuda.prefill_attention import attend_piece, prepare_piece
from engine.run.cuda.steps import CallWatch


class LongPieces:
    """Forwards of at most ``rows`` rows of one chunk, whose context stands where it was computed.

    ``last`` is where sources that name a slot look. Buffers of that many rows are made with the first piece.
    """

    def __init__(self, forward: FusedForward, last: Tensor, *, rows: int) -> None:
        self.forward = forward
        self.watch: CallWatch | None = None
        self._last = last
        self._rows = rows
        self._buffers: Buffers | None = None
        self._ring: InputRing | None = None

    def launch(self, plan: CascadePlan, sources: Sequence[int]) -> None:
        """Begins to compute the keys and values of a plan of one sequence. Raises ``ValueError`` for moved context."""
        if any(any(read.offsets) for read in plan.reads):
            raise ValueError("begin: the context of a piece that runs alone stands at its computed places")
        buffers, ring = self._made()
        forward, pool = self.forward, self.forward.pool
        scaling = forward.weights.scaling
        step = prepare_piece(plan, pool.page_size, pool.device)
        ring.send(sources, plan.positions, plan.slots)

        def attend(layer: int, q: Tensor, turned: Tensor, out: Tensor) -> None:
            attend_piece(step, lambda offset: turned, pool.keys[layer], pool.values[layer], scaling, out)
            if self.watch is not None:
                self.watch(plan, layer, q, out, scaling)

        forward.layers(buffers.first(len(sources)), self._last, attend, turn=True, drawn=None)

    def prepare(self) -> None:
        """Compiles the kernels of pieces, on the scratch page: folding results of one chunk and of several."""
        pool = self.forward.pool
        for rows in (pool.page_size, pool.page_size - 1):  # Triton compiles apart what is a multiple of 16
            rows = min(rows, self._rows)
            for chunks in (1, 3):
                context = (PlacedChunk(pool.scratch_page * pool.page_size, rows, 0),) * chunks
                sequence = StepSequence(context, (pool.scratch_page,), 0, rows, 0)
                plan = plan_step([sequence], plan_levels([sequence], max_cascade_levels=1), page_size=pool.page_size)
                self.launch(plan, [0] * rows)

    def _made(self) -> tuple[Buffers, InputRing]:
        if self._buffers is None or self._ring is None:
            weights = self.forward.weights
            inputs = torch.zeros(3, self._rows, dtype=torch.int32, device=self.forward.pool.device)
            sources, positions, slots = inputs
            made = Buffers.of(weights, self._rows)
            self._buffers = replace(made, sources=sources, positions=positions, slots=slots)
            self._ring = InputRing(inputs)
        return self._buffers, self._ring
