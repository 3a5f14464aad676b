"""64 requests over one document keep one copy of it, and a step reads its bytes once."""

from __future__ import annotations

import torch

from engine.model.borrowed import BorrowedModel
from engine.plan import CascadePlan
from engine.served import serve
from tests.architectures import build_named
from tests.engine.composer import Composer

DOCUMENT = torch.randint(0, 211, (400,), generator=torch.Generator().manual_seed(1)).tolist()


def plans_of(mode: str, before: list[list[int]]) -> tuple[Composer, CascadePlan]:
    served = serve(BorrowedModel(build_named("qwen3-ratio4"), name="qwen3"))
    composer = Composer(served, pages=1024, page_size=16)
    starts = range(max(len(before), 1))
    requests = [([*before[starts[i % len(starts)] :], DOCUMENT], [3 + i, 5], mode) for i in range(64)]
    composer.generate(requests, 2)
    plan = composer.plans[-1]
    assert isinstance(plan, CascadePlan)
    return composer, plan


def test_one_copy_and_one_read_in_exact() -> None:
    composer, plan = plans_of("exact", [])
    assert composer.computed == 400
    assert composer.pool.count()["chunk"] == 25
    assert plan.tokens_read == 400 + 64 * 3
    assert sum(read.tokens * len(read.rows) for read in plan.reads) == 64 * 400
    assert [len(level) for level in plan.levels] == [1]


def test_one_copy_and_one_read_at_different_offsets() -> None:
    prefixes = [[7] * 30, [8] * 11]
    composer, plan = plans_of("independent", prefixes)
    assert composer.computed == 400 + 30 + 11
    reads = {read.tokens: read for read in plan.reads}
    assert sorted(reads) == [11, 30, 400]
    assert len(reads[400].rows) == 64
    assert set(reads[400].offsets) == {41, 11}
    assert plan.tokens_read == 441 + 64 * 3
