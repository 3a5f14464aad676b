"""Plans of pieces and decode steps, the same for every runner."""

from __future__ import annotations

from collections.abc import Sequence

from engine.kv.pool import PagedKVPool
from engine.plan import CascadePlan, Levels, PlacedChunk, StepSequence, plan_levels, plan_step

DECODE_BUCKETS = (1, 4, 8, 16, 32, 64)


def plan_piece(token_ids: Sequence[int], sequence: StepSequence, page_size: int, most: int) -> CascadePlan:
    """The plan of one sequence alone. Raises ``ValueError`` unless there is a token for each row, at most ``most``."""
    if len(token_ids) != sequence.rows or not 1 <= sequence.rows <= most:
        raise ValueError(f"prefill: {len(token_ids)} tokens for {sequence.rows} rows; 1 to {most} of each are needed")
    return plan_step([sequence], plan_levels([sequence], max_cascade_levels=1), page_size=page_size)


class DecodePlanner:
    """Plans a runner's decode steps: ``buckets`` are the numbers of rows, ascending, that they are padded to."""

    def __init__(self, pool: PagedKVPool, buckets: Sequence[int], max_cascade_levels: int) -> None:
        self.buckets = tuple(sorted(buckets))
        self._pool = pool
        self._max_cascade_levels = max_cascade_levels
        self._levels: tuple[tuple[tuple[PlacedChunk, ...], ...], Levels] | None = None
        self._rows_before = 0

    def forget_rows(self) -> None:
        """What runs now is no decode step: the next one cannot name its rows."""
        self._rows_before = 0

    def plan(self, sources: Sequence[int], sequences: Sequence[StepSequence]) -> CascadePlan:
        """The next step's plan, without padding. Raises ``ValueError`` as ``Runner.decode`` does."""
        if len(sources) != len(sequences) or any(s.rows != 1 for s in sequences):
            raise ValueError("decode: one token and one row for each sequence")
        if len(sequences) > self.buckets[-1]:
            raise ValueError(f"decode: {len(sequences)} sequences are more than the largest bucket, {self.buckets[-1]}")
        if min(sources, default=0) < -self._rows_before:
            raise ValueError(f"decode: row {~min(sources)} of a step of {self._rows_before} rows is named")
        plan = plan_step(sequences, self._levels_of(sequences), page_size=self._pool.page_size)
        self._rows_before = len(sequences)
        return plan

    def padded(self, plan: CascadePlan) -> CascadePlan:
        """The plan with rows on the scratch page up to the next bucket."""
        bucket = next(size for size in self.buckets if size >= len(plan.slots))
        return plan.padded(bucket, self._pool.scratch_page, self._pool.page_size)

    def _levels_of(self, sequences: Sequence[StepSequence]) -> Levels:
        """The levels of a step; the last step's again while its compositions did not change."""
        compositions = tuple(s.chunks for s in sequences)
        if self._levels is None or self._levels[0] != compositions:
            self._levels = compositions, plan_levels(sequences, max_cascade_levels=self._max_cascade_levels)
        return self._levels[1]
