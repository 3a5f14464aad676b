"""Whether what experts make of a row has the same bits among any rows: routing, both products, and their sum."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from engine.run.cuda.experts.launch import run_experts
from engine.run.cuda.experts.layer import ExpertBuffers, Experts
from engine.run.cuda.prefill_attention import launch_options

PICKS = 3  # sets of rows drawn at random for each number of rows


def rows_that_differ(layer: Experts, rows: Tensor, order: Tensor, counts: Sequence[int]) -> tuple[int, ...]:
    """Of ``counts`` those numbers of rows among which a row of ``rows`` (all, hidden) has other bits than among all.

    They are compared at the places and beside the rows that ``_picked`` names; ``order`` (all,) is a permutation.
    """
    buffers = ExpertBuffers.of(layer, len(rows))
    overlap = launch_options(rows.device)

    def results(x: Tensor) -> Tensor:
        out = torch.empty_like(x)
        run_experts(layer, x, out, buffers, overlap=overlap)
        return out.view(torch.int16)

    whole = results(rows)
    found = [
        torch.stack([(results(rows[picked]) != whole[picked]).any() for picked in _picked(order, count)]).any()
        for count in counts
    ]
    differs = torch.stack(found).tolist()
    return tuple(count for count, apart in zip(counts, differs, strict=True) if apart)


def _picked(order: Tensor, count: int) -> Iterator[Tensor]:
    """The first, the last, some at random; and some beside one that comes again and again, so that its experts have
    most of the rows."""
    yield torch.arange(count, device=order.device)
    yield torch.arange(len(order) - count, len(order), device=order.device)
    for pick in range(PICKS):
        yield order.roll(pick * 131)[:count]
    some = order[: -(-count // 4)]
    yield torch.cat([some, some[:1].expand(count - len(some))])
    yield torch.cat([some[:1].expand(count - len(some)), some])
