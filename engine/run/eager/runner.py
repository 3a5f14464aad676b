"""EagerRunner: forwards through the model's own code with our attention, on any device."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from engine.attention import Attention, Scores
from engine.device import on_pools_device
from engine.kv.pool import PagedKVPool
from engine.model.borrowed import BorrowedModel
from engine.plan import CascadePlan, StepSequence
from engine.run.planning import DECODE_BUCKETS, DecodePlanner, plan_piece
from engine.run.protocol import AttentionWatch, LayerWatch, LogitsStep


class EagerRunner:
    """The ``Runner`` of every model; ``row_multiple`` is what reads of a decode step of several rows are padded to."""

    def __init__(
        self,
        borrowed: BorrowedModel,
        pool: PagedKVPool,
        attention: Attention[Any],
        *,
        piece_tokens: int = 512,
        decode_buckets: Sequence[int] = DECODE_BUCKETS,
        row_multiple: int = 4,
        max_cascade_levels: int = 3,
    ) -> None:
        self.borrowed = borrowed
        self.pool = pool
        self.attention = attention
        self.piece_tokens = piece_tokens
        self.row_multiple = row_multiple
        self.runs_ahead = False
        self._planner = DecodePlanner(pool, decode_buckets, max_cascade_levels)
        self._last: LogitsStep | None = None  # the decode step before the next one

    def watch_attention(self, watch: AttentionWatch) -> None:
        self.attention = watch.around(self.attention)

    def watching_layers(self, watch: LayerWatch) -> AbstractContextManager[None]:
        return self.borrowed.watching_layers(watch)

    def prepare(self) -> None:
        """There is nothing of the kind here."""

    def prefill(self, token_ids: Sequence[int], sequence: StepSequence, *, logits: bool = True) -> LogitsStep:
        plan = plan_piece(token_ids, sequence, self.pool.page_size, self.piece_tokens)
        self._planner.forget_rows()
        last_row = self._forward(token_ids, plan, [len(token_ids) - 1], row_multiple=1)
        return LogitsStep(plan, last_row if logits else None)

    def decode(self, sources: Sequence[int], sequences: Sequence[StepSequence]) -> LogitsStep:
        plan = self._planner.plan(sources, sequences)
        before = self._last.wait() if self._last is not None and min(sources, default=0) < 0 else []
        padded = self._planner.padded(plan)
        rows = len(padded.slots)
        ids = [*(before[~source] if source < 0 else source for source in sources), *[0] * (rows - len(sources))]
        # The head runs on the padded rows too: one row fewer could be another kernel, and other bits.
        logits = self._forward(ids, padded, list(range(rows)), row_multiple=1 if rows == 1 else self.row_multiple)
        self._last = LogitsStep(plan, logits[: len(sequences)])
        return self._last

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
