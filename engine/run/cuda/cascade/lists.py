"""PlanLists: the work lists of plans for one shape of heads, on the host; what was made last is kept.

Layers with different windows see the same plan as long as nothing is hidden from any of them.
"""

from __future__ import annotations

from collections import deque

from engine.plan import CascadePlan, Levels
from engine.run.cuda.cascade.tuning import CHUNKS, LONG_TAILS, ROW_TAILS, AttentionShape, TileClass, Tuning
from engine.run.cuda.cascade.work import Ints, Limits, ListShape, SharedLists, shared_lists, tail_lists

KEPT = 8  # compositions whose shared lists are kept: as many as a model has windows, and more


class PlanLists:
    """Lists for the classes of ``tuning``; ``limits`` bound them."""

    def __init__(self, shape: AttentionShape, tuning: Tuning, limits: Limits) -> None:
        self.tuning = tuning
        self._page_size = shape.page_size
        self._ratio = shape.ratio
        self._limits = limits
        self._narrow, self._wide = (self._shape_of(members) for members in (tuning.narrow, tuning.wide))
        self._shared: deque[tuple[Levels, int, ListShape, SharedLists]] = deque(maxlen=KEPT)
        self._shape: tuple[Levels, int, ListShape] | None = None
        self._last: tuple[CascadePlan, SharedLists, Ints] | None = None

    def of(self, plan: CascadePlan, whole: CascadePlan | None = None) -> tuple[SharedLists, Ints]:
        """The static lists, the same object while compositions and row count are the same, and the dynamic blob.

        ``whole``: the plan that this is seen of. Its tiles are narrow or wide, and those of all that is seen of it with
        them, so that the sets of classes that steps have are few. Raises ``WorkTooLarge``.
        """
        if self._last is None or self._last[0] is not plan:
            shape = self._shape_for(plan if whole is None else whole)
            shared = self._shared_of(plan, shape)
            self._last = plan, shared, tail_lists(plan, shared, shape, self._page_size)
        return self._last[1:]

    def _shape_for(self, plan: CascadePlan) -> ListShape:
        rows = len(plan.slots)
        if self._shape is None or self._shape[0] is not plan.levels or self._shape[1] != rows:
            self._shape = plan.levels, rows, self._wide if self._is_wide(plan) else self._narrow
        return self._shape[2]

    def _shared_of(self, plan: CascadePlan, wanted: ListShape) -> SharedLists:
        rows = len(plan.slots)
        for levels, count, shape, shared in self._shared:
            if levels is plan.levels and count == rows and shape is wanted:
                return shared
        shared = shared_lists(plan.levels, rows, wanted)
        self._shared.append((plan.levels, rows, wanted, shared))
        return shared

    def _shape_of(self, members: tuple[TileClass, ...]) -> ListShape:
        chunks, row_tails, long_tails = (self.tuning.tiles(members, what) for what in (CHUNKS, ROW_TAILS, LONG_TAILS))
        return ListShape(self._ratio, chunks, row_tails, long_tails, self.tuning.splits, self._limits)

    def _is_wide(self, plan: CascadePlan) -> bool:
        most = self._narrow.chunk_tiles[-1][0] // self._ratio
        wide = sum(read.tokens - min(read.firsts, default=0) for read in plan.reads if len(read.rows) > most)
        long = [tail for tail in plan.tails if tail.rows > most]
        wide += sum(tail.tokens_before + tail.rows - min(tail.first, default=0) for tail in long)
        return wide >= self.tuning.wide_share * plan.tokens_read
