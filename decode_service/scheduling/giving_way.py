"""Who gives its pages up when they run out.

Among the requests of one tenant: the lowest priority, of those the youngest. Priorities say nothing to other tenants.
Each tenant's first, the oldest of its highest priority, gives way last: before that, the tenant whose other requests
have the most pages gives up its last one. Where no tenant has another, the youngest goes. So the oldest of those that
are first is never sent away while anybody else runs, and every tenant's first goes on while others could give way.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from enum import StrEnum
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from chunk_store.tenant import Tenant
    from decode_service.scheduling.sequence import Sequence


class GaveWay(StrEnum):
    """To what a request gave up its pages."""

    GROWTH = "growth"  # an answer that grew, its own or another one's


def rank(sequence: Sequence) -> tuple[int, int]:
    """The order among one tenant's requests, the first being the last to give way."""
    return -sequence.priority, sequence.clock.submitted


def who_gives_way(running: Iterable[Sequence]) -> Sequence:
    """Of those who have pages, of which there is at least one."""
    of: dict[Tenant, list[Sequence]] = defaultdict(list)
    for sequence in running:
        of[sequence.tenant].append(sequence)
    for mine in of.values():
        mine.sort(key=rank)
    several = [mine for mine in of.values() if len(mine) > 1]
    if several:
        return max(several, key=_weight)[-1]
    return max((mine[0] for mine in of.values()), key=lambda first: first.clock.submitted)


def _weight(mine: list[Sequence]) -> tuple[int, int]:
    """Pages of all but the first; among equals the tenant whose last came last."""
    return sum(len(sequence.own_pages) for sequence in mine[1:]), mine[-1].clock.submitted
