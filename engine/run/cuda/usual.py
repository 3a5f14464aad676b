"""Plans of the forms that serving meets, over the scratch page: what steps are prepared for."""

from __future__ import annotations

from dataclasses import replace

from engine.plan import CascadePlan, ChunkRead, Tail


def scratch_plan(rows: int, page: int, page_size: int) -> CascadePlan:
    """A step whose rows are nobody's, as many sequences as rows. It may be launched."""
    return CascadePlan((), (), (), (), 2).padded(rows, page, page_size)


def prefilling_plans(rows: int, page: int, page_size: int) -> list[CascadePlan]:
    """Steps of ``rows`` rows of one sequence, and with others beside it. For their lists only."""
    plans = []
    for own in {rows, max(2, rows // 2)} if rows > 1 else {1}:
        tail = Tail(0, own, (page,) * -(-own // page_size), 0)
        plan = CascadePlan((), (tail,), (0,) * own, (page * page_size,) * own, 2)
        plans.append(plan.padded(rows, page, page_size))
    return plans


def with_reads(plan: CascadePlan, slot: int) -> list[CascadePlan]:
    """The plan without chunks, with one that a row reads, and with a long one, at ``slot``, that every row reads."""
    rows = len(plan.slots)
    alone = ChunkRead(slot, 1, (0,), (0,), (0,), (0,))
    shared = ChunkRead(slot, 4 * rows, tuple(range(rows)), *((0,) * rows,) * 3)
    return [replace(plan, levels=levels) for levels in ((), ((alone,),), ((shared,),))]
