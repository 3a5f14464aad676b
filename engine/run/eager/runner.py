"""ModelRunner: the only place that runs forwards.

Caching is memoising one fixed computation, so what runs here is fixed too: a chunk or a query is one
sequence's forwards of at most ``piece_tokens`` rows, never packed with another request's; a decode step is one
row a sequence, padded to a bucket. The runner does not know requests, keys or stores.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from engine.attention import Attention, Scores
from engine.kv.pages import PageRun
from engine.kv.pool import PagedKVPool
from engine.model.borrowed import BorrowedModel
from engine.plan import CascadePlan, Levels, PlacedChunk, StepSequence, plan_levels, plan_step
from engine.run.device import on_pools_device

# plan, layer, queries (rows, heads, dim) before rotation, attention (rows, heads, dim), scaling
AttentionWatch = Callable[[CascadePlan, int, Tensor, Tensor, float], None]


def chunk_pages(context: Sequence[PlacedChunk], run: PageRun) -> tuple[int, ...]:
    """The pages of a chunk that is computed under ``context``. Raises ``ValueError`` for context that was moved."""
    if any(chunk.offset for chunk in context):
        raise ValueError("context: chunks that a chunk is computed under stand at their computed places")
    return tuple(range(run.first, run.first + run.pages))


class ModelRunner:
    """Forwards over one pool.

    ``piece_tokens`` is the most rows of a prefill forward; ``decode_buckets`` the batch sizes, ascending, that
    decode steps are padded to; ``row_multiple`` what reads of a decode step of more than one row are padded to.
    """

    def __init__(
        self,
        borrowed: BorrowedModel,
        pool: PagedKVPool,
        attention: Attention[Any],
        *,
        piece_tokens: int = 512,
        decode_buckets: Sequence[int] = (1, 4, 8, 16, 32, 64),
        row_multiple: int = 4,
        max_cascade_levels: int = 3,
    ) -> None:
        self.borrowed = borrowed
        self.pool = pool
        self.attention = attention
        self.piece_tokens = piece_tokens
        self.decode_buckets = tuple(sorted(decode_buckets))
        self.row_multiple = row_multiple
        self.max_cascade_levels = max_cascade_levels
        self._levels: tuple[tuple[tuple[PlacedChunk, ...], ...], Levels] | None = None

    def watch_attention(self, watch: AttentionWatch) -> None:
        """Has ``watch`` called after every attention call that does not go through ``attention``; none here."""

    def prepare(self) -> None:
        """Makes ready what the first forwards would otherwise wait for; here there is nothing of the kind."""

    def prefill_chunk(self, token_ids: Sequence[int], context: Sequence[PlacedChunk], run: PageRun) -> None:
        """Computes a chunk's KV into ``run``; its tokens stand behind ``context`` and attend to it.

        In every reuse mode the context of a chunk stands where it was computed: all offsets are 0.
        """
        for first in range(0, len(token_ids), self.piece_tokens):
            self.prefill_chunk_piece(token_ids, first, context, run)

    def prefill_chunk_piece(
        self, token_ids: Sequence[int], first: int, context: Sequence[PlacedChunk], run: PageRun
    ) -> None:
        """One forward of ``prefill_chunk``: the tokens from ``first`` on, at most ``piece_tokens`` of them."""
        self.prefill_piece(token_ids, first, context, chunk_pages(context, run), start=sum(c.tokens for c in context))

    def prefill_tail(
        self, token_ids: Sequence[int], context: Sequence[PlacedChunk], pages: Sequence[int], *, start: int
    ) -> Tensor:
        """Computes a tail's KV into ``pages``, from position ``start``; logits (vocabulary,) fp32 of its last token."""
        logits = None
        for first in range(0, len(token_ids), self.piece_tokens):
            logits = self.prefill_piece(token_ids, first, context, pages, start=start)
        if logits is None:
            raise ValueError("token_ids: at least one token is needed")
        return logits

    def prefill_piece(
        self,
        token_ids: Sequence[int],
        first: int,
        context: Sequence[PlacedChunk],
        pages: Sequence[int],
        *,
        start: int,
    ) -> Tensor:
        """One forward of ``prefill_tail``: the tokens from ``first`` on, at most ``piece_tokens`` of them."""
        piece = token_ids[first : first + self.piece_tokens]
        sequence = StepSequence(tuple(context), tuple(pages), first, len(piece), start + first)
        levels = plan_levels([sequence], max_cascade_levels=self.max_cascade_levels)
        plan = plan_step([sequence], levels, page_size=self.pool.page_size)
        return self._forward(piece, plan, [len(piece) - 1], row_multiple=1)[0]

    def decode(self, token_ids: Sequence[int], sequences: Sequence[StepSequence]) -> tuple[Tensor, CascadePlan]:
        """One token for each sequence; logits (sequences, vocabulary) fp32 and the plan, without padding."""
        if len(token_ids) != len(sequences) or any(s.rows != 1 for s in sequences):
            raise ValueError("decode: one token and one row for each sequence")
        plan = plan_step(sequences, self._levels_of(sequences), page_size=self.pool.page_size)
        padded, multiple = self._pad(plan, len(sequences))
        ids = [*token_ids, *([0] * (len(padded.slots) - len(token_ids)))]
        # The head runs on the padded rows too: one row fewer could be another kernel, and other bits.
        logits = self._forward(ids, padded, list(range(len(ids))), row_multiple=multiple)
        return logits[: len(sequences)], plan

    def _levels_of(self, sequences: Sequence[StepSequence]) -> Levels:
        """The levels of a decode step; the last step's again while its compositions did not change."""
        compositions = tuple(s.chunks for s in sequences)
        if self._levels is None or self._levels[0] != compositions:
            self._levels = compositions, plan_levels(sequences, max_cascade_levels=self.max_cascade_levels)
        return self._levels[1]

    def _pad(self, plan: CascadePlan, rows: int) -> tuple[CascadePlan, int]:
        """The plan with rows on the scratch page up to the next bucket, and the multiple reads are padded to."""
        bucket = next((size for size in self.decode_buckets if size >= rows), None)
        if bucket is None:
            raise ValueError(f"decode: {rows} sequences are more than the largest bucket, {self.decode_buckets[-1]}")
        return plan.padded(bucket, self.pool.scratch_page, self.pool.page_size), 1 if bucket == 1 else self.row_multiple

    @on_pools_device
    def _forward(self, token_ids: Sequence[int], plan: CascadePlan, rows: list[int], *, row_multiple: int) -> Tensor:
        device = self.pool.device
        step = self.attention.prepare(plan, row_multiple=row_multiple)

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor, scores: Scores) -> Tensor:
            return self.attention.attend(step, layer, q, k, v, scores)

        return self.borrowed.forward(
            torch.tensor(token_ids, device=device),
            torch.tensor(plan.positions, device=device),
            attend,
            torch.tensor(rows, device=device),
        )
