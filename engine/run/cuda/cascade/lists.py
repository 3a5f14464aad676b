"""PlanLists: the work lists of plans for one shape of heads, on the host; what was made last is kept.

Layers with different windows see the same as long as nothing is hidden from any of them.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from engine.plan import CascadePlan, Levels, Window
from engine.run.cuda.cascade.reads import Ints, PairReads, first_seen
from engine.run.cuda.cascade.records import Limits, ListShape
from engine.run.cuda.cascade.shared import SharedLists, shared_lists
from engine.run.cuda.cascade.tails import tail_lists
from engine.run.cuda.cascade.tuning import CHUNKS, LONG_TAILS, ROW_TAILS, AttentionShape, TileClass, Tuning

Made = tuple[SharedLists, Ints]


@dataclass(frozen=True)
class _Compositions:
    """What is made of the levels and the row count of a step, whose tiles ``shape`` has."""

    levels: Levels
    rows: int
    shape: ListShape
    reads: PairReads
    shared: dict[Window | None, tuple[Ints | None, SharedLists]]  # with what was hidden of each pair


class PlanLists:
    """Lists for the classes of ``tuning``; ``limits`` bound them."""

    def __init__(self, shape: AttentionShape, tuning: Tuning, limits: Limits) -> None:
        self.tuning = tuning
        self._page_size = shape.page_size
        self._ratio = shape.ratio
        self._limits = limits
        self._narrow, self._wide = (self._shape_of(members) for members in (tuning.narrow, tuning.wide))
        self._compositions: _Compositions | None = None
        self._last: tuple[CascadePlan, dict[Window | None, Made]] | None = None

    def of(self, plan: CascadePlan, window: Window | None = None) -> Made:
        """The static lists, the same object while they stay what they are, and the dynamic blob, of what rows see of
        the plan through ``window``.

        Tiles are narrow or wide by the whole plan, so that the sets of classes that steps have are few. Raises
        ``WorkTooLarge``.
        """
        if self._last is None or self._last[0] is not plan:
            self._last = plan, {}
        seen = first_seen(window, np.array(plan.positions, np.int32))
        window = None if seen is None else window
        made = self._last[1].get(window)
        if made is None:
            compositions = self._compositions_of(plan)
            shared = _shared_of(compositions, window, seen)
            made = shared, tail_lists(plan, shared, compositions.shape, self._page_size, seen)
            self._last[1][window] = made
        return made

    def _compositions_of(self, plan: CascadePlan) -> _Compositions:
        last, rows = self._compositions, len(plan.slots)
        if last is None or last.levels is not plan.levels or last.rows != rows:
            shape = self._wide if self._is_wide(plan) else self._narrow
            self._compositions = last = _Compositions(plan.levels, rows, shape, PairReads.of(plan.levels), {})
        return last

    def _shape_of(self, members: tuple[TileClass, ...]) -> ListShape:
        chunks, row_tails, long_tails = (self.tuning.tiles(members, what) for what in (CHUNKS, ROW_TAILS, LONG_TAILS))
        return ListShape(self._ratio, chunks, row_tails, long_tails, self.tuning.splits, self._limits)

    def _is_wide(self, plan: CascadePlan) -> bool:
        most = self._narrow.chunk_tiles[-1][0] // self._ratio
        wide = sum(read.tokens for read in plan.reads if len(read.rows) > most)
        wide += sum(tail.tokens_before + tail.rows for tail in plan.tails if tail.rows > most)
        return wide >= self.tuning.wide_share * plan.tokens_read


def _shared_of(compositions: _Compositions, window: Window | None, seen: Ints | None) -> SharedLists:
    reads = compositions.reads
    hidden = None if seen is None else reads.hidden(seen)
    last = compositions.shared.get(window)
    if last is None or not (hidden is last[0] or np.array_equal(hidden, last[0])):  # type: ignore[arg-type]
        left = reads if hidden is None else reads.without(hidden)
        last = hidden, shared_lists(left, compositions.rows, compositions.shape)
        compositions.shared[window] = last
    return last[1]
