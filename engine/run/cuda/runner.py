"""FusedRunner: the runner of plain decoders on CUDA, with captured steps and fused layers.

    rows up to the largest bucket, lists that fit      captured step over the cascade kernels   (steps.py)
    more                                               one eager forward, library attention     (prefill_attention.py)

Which way a forward takes depends on its own rows and composition alone, so a chunk's bits never depend on what else
is running. A decode step's bits depend on its bucket (cuBLAS takes another kernel for another number of rows), not on
what its other rows are; with one bucket, as ``--strict`` has, an answer is the same alone and among others. Stored KV
does not depend on the buckets of decode steps. Tokens are drawn on the host.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from engine.device import on_pools_device
from engine.kv.pool import PagedKVPool
from engine.plan import CascadePlan
from engine.run.cuda.cascade.launch import Tuning
from engine.run.cuda.cascade.work import WorkTooLarge
from engine.run.cuda.forward import Buffers, FusedForward
from engine.run.cuda.prefill_attention import attend_piece, prepare_piece
from engine.run.cuda.products import BUCKETS
from engine.run.cuda.steps import CallWatch, StepLimits, Steps
from engine.run.cuda.weights import FusedWeights
from engine.run.planning import DECODE_BUCKETS, StepPlanner
from engine.run.protocol import AttentionWatch, DrawnStep, LayerWatch, StepRows
from engine.run.room import StepRoom
from engine.sampling.params import SamplingRequest
from engine.sampling.sampler import HostSlots

PIECE_BUCKETS = (8, 64, 128, 256)


class FusedRunner:
    """Forwards over one pool on CUDA; ``positions`` is the longest context, ``name`` enters the model identity."""

    name = "fused-3"

    def __init__(
        self,
        weights: FusedWeights,
        pool: PagedKVPool,
        *,
        positions: int,
        piece_tokens: int = 8192,
        decode_buckets: Sequence[int] = DECODE_BUCKETS,
        row_buckets: Sequence[int] = BUCKETS,
        max_cascade_levels: int = 3,
        limits: StepLimits | None = None,
        tuning: Tuning | None = None,
        graphs: bool = True,
    ) -> None:
        self.pool = pool
        self.piece_tokens = piece_tokens
        self.runs_ahead = False
        least = row_buckets[0]
        self._buckets = tuple(sorted({max(size, least) for size in decode_buckets}))
        self.slots = self._buckets[-1]
        self._planner = StepPlanner(pool, max_cascade_levels)
        self._sampling = HostSlots(self.slots, weights.vocabulary)
        self.weights = weights
        self.forward = FusedForward(weights, pool, positions=positions)
        limits = limits or StepLimits(rows=max(256, *self._buckets))
        self._tuning, self._graphs = tuning, graphs
        # Short pieces keep to their first lists: which way a piece takes must not depend on what came before.
        self._pieces = Steps(self.forward, limits=limits, tuning=tuning, graphs=graphs)
        self.steps = self._pieces
        self._piece_buckets = tuple(b for b in PIECE_BUCKETS if least <= b <= self._pieces.limits.rows)
        self._buffers: Buffers | None = None
        self._watch: CallWatch | None = None
        self._nothing = torch.zeros(1, dtype=torch.int64, device=pool.device)

    def watch_attention(self, watch: AttentionWatch) -> None:
        if self._graphs:
            raise ValueError("watch_attention: a captured step calls nothing; make the runner with graphs=False")
        self._watch = self._pieces.watch = watch.after

    @contextmanager
    def watching_layers(self, watch: LayerWatch) -> Iterator[None]:
        self.forward.watch = watch
        try:
            yield
        finally:
            self.forward.watch = None

    def alone(self, tokens: int, *, chunk: bool) -> bool:
        return True

    def room(self, *, decoding: bool) -> StepRoom:
        return StepRoom(self._buckets[-1])

    def open(self, slot: int, request: SamplingRequest) -> None:
        self._sampling.open(slot, request)

    @on_pools_device
    @torch.inference_mode()
    def begin(self, batch: Sequence[StepRows]) -> DrawnStep:
        plan = self._planner.plan(batch, piece_tokens=self.piece_tokens)
        sources = [source for rows in batch for source in rows.sources]
        ids = [max(0, self._sampling.last(~source)) if source < 0 else source for source in sources]
        draws = [rows.draw for rows in batch if rows.draw is not None]
        if batch[0].alone:
            logits = self._piece(ids, plan, logits=bool(draws))
        else:
            wanted = [row for row, rows in enumerate(batch) if rows.draw is not None]
            logits = self._decode(ids, batch, plan)[wanted].float()
        return DrawnStep(plan, self._sampling.draw(logits.cpu(), draws) if draws else [], logits)

    # -- prefill ------------------------------------------------------------------------------------
    def _piece(self, token_ids: list[int], plan: CascadePlan, *, logits: bool) -> Tensor:
        """Logits (1, vocabulary) fp32 of the last row, (0, vocabulary) if none are wanted."""
        rows = len(token_ids)
        bucket = next((size for size in self._piece_buckets if size >= rows), None)
        if bucket is not None:
            padded = plan.padded(bucket, self.pool.scratch_page, self.pool.page_size)
            try:
                every = self._pieces.run(padded, [*token_ids, *[0] * (bucket - rows)])
                return every[rows - 1 : rows if logits else rows - 1].float()
            except WorkTooLarge:  # decided by this sequence's lengths alone: always the same for the same chunk
                pass
        return self._long_piece(token_ids, plan, logits=logits)

    def _long_piece(self, piece: Sequence[int], plan: CascadePlan, *, logits: bool) -> Tensor:
        if self._buffers is None:
            self._buffers = Buffers.of(self.weights, max(self.piece_tokens, self.steps.limits.rows))
        step = prepare_piece(plan, self.pool.page_size, self.pool.device)
        b = self._buffers.first(len(piece))
        for target, values in ((b.sources, piece), (b.positions, plan.positions), (b.slots, plan.slots)):
            target.copy_(torch.tensor(values, dtype=torch.int32))

        def attend(layer: int, q: Tensor, turned: Tensor, out: Tensor) -> None:
            def queries(offset: int) -> Tensor:
                return turned if offset == 0 else self.forward.turn_queries(q, b.positions, offset)

            keys, values = self.pool.keys[layer], self.pool.values[layer]
            attend_piece(step, queries, keys, values, self.weights.scaling, out)
            if self._watch is not None:
                self._watch(plan, layer, q, out, self.weights.scaling)

        head = torch.empty(1, self.weights.vocabulary, dtype=self.weights.head.dtype, device=self.pool.device)
        wanted = head if logits else None
        self.forward.layers(b, self._nothing, attend, turn=True, last_row_only=True, logits=wanted)
        return head[: int(logits)].float()

    # -- decode -------------------------------------------------------------------------------------
    def _decode(self, ids: list[int], batch: Sequence[StepRows], plan: CascadePlan) -> Tensor:
        """Logits (rows, vocabulary), overwritten by the next step."""
        if len(ids) != len(batch):
            raise ValueError(f"begin: {len(ids)} rows of {len(batch)} sequences; several rows of one are a piece alone")
        if len(ids) > self._buckets[-1]:
            raise ValueError(f"begin: {len(ids)} rows are more than the largest bucket, {self._buckets[-1]}")
        padded = self._planner.padded(plan, self._buckets)
        filled = [*ids, *[0] * (len(padded.slots) - len(ids))]
        while True:
            try:
                return self.steps.run(padded, filled)[: len(ids)]
            except WorkTooLarge:
                self._grow()

    def _grow(self) -> None:
        """Decode steps of twice as many pairs and partial results; their graphs are captured anew as they come."""
        torch.cuda.synchronize(self.pool.device)
        limits = self.steps.limits
        larger = StepLimits(limits.rows, 2 * limits.pairs, 2 * limits.partials)
        grown = Steps(self.forward, limits=larger, tuning=self._tuning, graphs=self._graphs)
        grown.adopt(self.steps)
        self.steps = grown

    @on_pools_device
    def prepare(self) -> None:
        """Compiles and captures every bucket."""
        for rows in self._buckets:
            self.steps.prepare(rows)
        for rows in self._piece_buckets:
            self._pieces.prepare(rows, piece=True)
