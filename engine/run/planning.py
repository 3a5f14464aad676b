"""Plans of steps, the same for every runner."""

from __future__ import annotations

from collections.abc import Sequence

from engine.kv.pool import PagedKVPool
from engine.plan import CascadePlan, Levels, PlacedChunk, plan_levels, plan_step
from engine.run.protocol import StepRows

DECODE_BUCKETS = (1, 4, 8, 16, 32, 64)
CASCADE_LEVELS_MAX = 32  # a chunk beyond is read once for every sequence, so there is nothing in fewer
PIECE_LEVELS = 1  # a piece that runs alone shares its reads with nobody


class StepPlanner:
    """Plans a runner's steps; ``max_cascade_levels`` bounds the levels of those that are not alone."""

    def __init__(self, pool: PagedKVPool, max_cascade_levels: int) -> None:
        self._pool = pool
        self._max_cascade_levels = max_cascade_levels
        self._levels: tuple[tuple[tuple[tuple[PlacedChunk, ...], int], ...], Levels] | None = None

    def plan(self, batch: Sequence[StepRows], *, piece_tokens: int) -> CascadePlan:
        """The step's plan, without padding. Raises ``ValueError`` as ``Runner.begin`` does."""
        check_batch(batch, piece_tokens)
        sequences = [rows.sequence for rows in batch]
        return plan_step(sequences, self._levels_of(batch), page_size=self._pool.page_size)

    def _levels_of(self, batch: Sequence[StepRows]) -> Levels:
        """The levels of a step; the last one's again while compositions and numbers of rows did not change."""
        if batch[0].alone:
            return plan_levels([batch[0].sequence], max_cascade_levels=PIECE_LEVELS)
        key = tuple((rows.sequence.chunks, rows.sequence.rows) for rows in batch)
        if self._levels is None or self._levels[0] != key:
            sequences = [rows.sequence for rows in batch]
            self._levels = key, plan_levels(sequences, max_cascade_levels=self._max_cascade_levels)
        return self._levels[1]


def padded_to(plan: CascadePlan, buckets: Sequence[int], pool: PagedKVPool, *, rows_min: int = 1) -> CascadePlan:
    """The plan with rows on the pool's scratch page up to the next of ``buckets`` (ascending), ``rows_min`` at least.

    Raises ``ValueError`` for more rows than the largest.
    """
    rows = max(len(plan.slots), rows_min)
    bucket = next((size for size in buckets if size >= rows), None)
    if bucket is None:
        raise ValueError(f"begin: {rows} rows, a step has {buckets[-1]} at most")
    return plan.padded(bucket, pool.scratch_page, pool.page_size)


def check_batch(batch: Sequence[StepRows], piece_tokens: int) -> None:
    """Raises ``ValueError`` for what no runner begins: no rows, rows without sources, more than one piece."""
    if not batch:
        raise ValueError("begin: a step needs rows")
    if len(batch) > 1 and any(rows.alone for rows in batch):
        raise ValueError(f"begin: a piece runs alone, not in a step of {len(batch)} sequences")
    for rows in batch:
        if not 1 <= rows.sequence.rows == len(rows.sources):
            raise ValueError(f"begin: {len(rows.sources)} sources for {rows.sequence.rows} rows")
    if batch[0].alone and len(batch[0].sources) > piece_tokens:
        raise ValueError(f"begin: a piece of {len(batch[0].sources)} rows, {piece_tokens} are the most")
