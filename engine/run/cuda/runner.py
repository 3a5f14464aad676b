"""FusedRunner: ``ModelRunner`` for plain decoders on CUDA, with captured steps and fused layers.

    rows up to the largest bucket, lists that fit      captured step over the cascade kernels   (steps.py)
    more                                               one eager forward, library attention     (prefill_attention.py)

Which way a forward takes depends on its own rows and composition alone, so a chunk's bits never depend on what else
is running. A decode step's bits depend on its bucket (cuBLAS takes another kernel for another number of rows), not on
what its other rows are; with one bucket, as ``--strict`` has, an answer is the same alone and among others. Stored KV
does not depend on the buckets of decode steps. Decode steps may be pipelined: ``launch`` returns before the step has
run, and the next one may name the tokens it samples.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from engine.attention import Attention
from engine.kv.pages import PageRun
from engine.kv.pool import PagedKVPool
from engine.model.borrowed import BorrowedModel
from engine.plan import CascadePlan, PlacedChunk, StepSequence, plan_levels, plan_step
from engine.run.cuda.cascade.launch import Tuning
from engine.run.cuda.cascade.work import WorkTooLarge
from engine.run.cuda.forward import Buffers, FusedForward
from engine.run.cuda.prefill_attention import attend_piece, prepare_piece
from engine.run.cuda.steps import StepLimits, Steps, Tokens
from engine.run.cuda.weights import FusedWeights
from engine.run.device import on_pools_device
from engine.run.eager.runner import AttentionWatch, ModelRunner, chunk_pages

PIECE_BUCKETS = (8, 64, 128, 256)


class FusedRunner(ModelRunner):
    """Forwards over one pool on CUDA; ``positions`` is the longest context, ``name`` enters the model identity.

    Logits that ``prefill_*`` and ``decode`` return are fp32, on the device, and the caller's to keep.
    """

    name = "fused-2"

    def __init__(
        self,
        borrowed: BorrowedModel,
        weights: FusedWeights,
        pool: PagedKVPool,
        attention: Attention[Any],
        *,
        positions: int,
        piece_tokens: int = 8192,
        decode_buckets: Sequence[int] = (1, 4, 8, 16, 32, 64),
        row_multiple: int = 1,
        max_cascade_levels: int = 3,
        limits: StepLimits | None = None,
        tuning: Tuning | None = None,
        graphs: bool = True,
    ) -> None:
        super().__init__(
            borrowed, pool, attention, piece_tokens=piece_tokens, decode_buckets=decode_buckets,
            row_multiple=row_multiple, max_cascade_levels=max_cascade_levels,
        )  # fmt: skip
        self.weights = weights
        self.forward = FusedForward(weights, pool, positions=positions)
        limits = limits or StepLimits(rows=max(256, *decode_buckets))
        self._tuning, self._graphs = tuning, graphs
        # Short pieces keep to their first lists: which way a piece takes must not depend on what came before.
        self._pieces = Steps(self.forward, limits=limits, tuning=tuning, graphs=graphs)
        self.steps = self._pieces
        self._piece_buckets = tuple(b for b in PIECE_BUCKETS if b <= self._pieces.limits.rows)
        self._buffers: Buffers | None = None
        self._watch: AttentionWatch | None = None
        self._nothing = torch.zeros(1, dtype=torch.int64, device=pool.device)

    def watch_attention(self, watch: AttentionWatch) -> None:
        if self._graphs:
            raise ValueError("watch_attention: a captured step calls nothing; make the runner with graphs=False")
        self._watch = watch
        self._pieces.watch = watch

    # -- prefill ------------------------------------------------------------------------------------
    @on_pools_device
    def prefill_chunk_piece(
        self, token_ids: Sequence[int], first: int, context: Sequence[PlacedChunk], run: PageRun
    ) -> None:
        start = sum(chunk.tokens for chunk in context)
        self._piece(token_ids, first, context, chunk_pages(context, run), start, logits=False)

    @on_pools_device
    def prefill_piece(
        self,
        token_ids: Sequence[int],
        first: int,
        context: Sequence[PlacedChunk],
        pages: Sequence[int],
        *,
        start: int,
    ) -> Tensor:
        logits = self._piece(token_ids, first, context, pages, start, logits=True)
        assert logits is not None
        return logits

    @torch.inference_mode()
    def _piece(
        self,
        token_ids: Sequence[int],
        first: int,
        context: Sequence[PlacedChunk],
        pages: Sequence[int],
        start: int,
        *,
        logits: bool,
    ) -> Tensor | None:
        piece = token_ids[first : first + self.piece_tokens]
        sequence = StepSequence(tuple(context), tuple(pages), first, len(piece), start + first)
        plan = plan_step([sequence], plan_levels([sequence], max_cascade_levels=1), page_size=self.pool.page_size)
        bucket = next((size for size in self._piece_buckets if size >= len(piece)), None)
        if bucket is not None:
            padded = plan.padded(bucket, self.pool.scratch_page, self.pool.page_size)
            try:
                every = self._pieces.run(padded, [*piece, *[0] * (bucket - len(piece))])
                return every[len(piece) - 1].float()
            except WorkTooLarge:  # decided by this sequence's lengths alone: always the same for the same chunk
                pass
        return self._long_piece(piece, plan, logits=logits)

    def _long_piece(self, piece: Sequence[int], plan: CascadePlan, *, logits: bool) -> Tensor | None:
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
        return head[0].float() if logits else None

    # -- decode -------------------------------------------------------------------------------------
    @on_pools_device
    def decode(self, token_ids: Sequence[int], sequences: Sequence[StepSequence]) -> tuple[Tensor, CascadePlan]:
        logits, plan = self._step(token_ids, sequences)
        return logits[: len(sequences)].float(), plan

    @on_pools_device
    def launch(self, sources: Sequence[int], sequences: Sequence[StepSequence]) -> tuple[Tokens, CascadePlan]:
        """A greedy step that is not waited for.

        ``sources[i]`` is a token id, or ``~row`` for the token that the last step sampled in that row.
        """
        _, plan = self._step(sources, sequences)
        return self.steps.tokens(len(sequences)), plan

    def _step(self, sources: Sequence[int], sequences: Sequence[StepSequence]) -> tuple[Tensor, CascadePlan]:
        if len(sources) != len(sequences) or any(s.rows != 1 for s in sequences):
            raise ValueError("decode: one token and one row for each sequence")
        plan = plan_step(sequences, self._levels_of(sequences), page_size=self.pool.page_size)
        padded, _ = self._pad(plan, len(sequences))
        filled = [*sources, *[0] * (len(padded.slots) - len(sources))]
        while True:
            try:
                return self.steps.run(padded, filled), plan
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
        """Compiles and captures every bucket, so that no request waits for it."""
        for rows in self.decode_buckets:
            self.steps.prepare(rows)
        for rows in self._piece_buckets:
            self._pieces.prepare(rows, piece=True)
