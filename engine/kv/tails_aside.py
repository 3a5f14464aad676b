"""Host memory for tails whose pages went to somebody else: their bytes leave the pool and come back unchanged.

    tail pages   7 [0 .. 15]   3 [16 .. 31]   9 [32 .. 40]
                     |             |              |            behind all that was launched, before the pages' new owner
    run          f [0 .. 15] f+1 [16 .. 31] f+2 [32 .. 40]     of host memory, pinned beside a card

Who has which run is kept in ``table``, which knows no bytes; the moves are carried out in the order in which it was
changed, by the thread that launches device work. The host waits for none of them.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from engine.device import current
from engine.kv.pages import PageRun, PageTable
from engine.kv.pool import PagedKVPool

POOLS = 4.0  # times the pages that tails have: what all requests give up while answers grow to many times their number


class TailsAside:
    """``nbytes`` of host memory at most, in pages of the pool's size."""

    def __init__(self, pool: PagedKVPool, nbytes: int) -> None:
        self._pool = pool
        pages = min(nbytes // pool.layout.nbytes(pool.page_size), int(POOLS * (pool.pages - pool.chunk_pages)))
        self.table = PageTable(pages=pages, chunk_pages=pages, page_size=pool.page_size)
        pinned = pool.device.type == "cuda" and pages > 0
        with current(pool.device):
            self._planes = [
                torch.empty((pages * pool.page_size, *plane.shape[1:]), dtype=plane.dtype, pin_memory=pinned)
                for plane in pool.planes
            ]

    def put(self, pages: Sequence[int], run: PageRun) -> None:
        """Begins to copy tail pages into the run, which has as many."""
        size = self._pool.page_size
        with current(self._pool.device):
            for plane, gathered in zip(self._planes, self._pool.gather_tail(pages), strict=True):
                there = plane[run.first * size : (run.first + run.pages) * size]
                there.view(gathered.shape).copy_(gathered, non_blocking=True)

    def bring_back(self, run: PageRun, pages: Sequence[int]) -> None:
        """Begins to copy the run into the first of these tail pages."""
        size = self._pool.page_size
        with current(self._pool.device):
            here = (plane[run.first * size : (run.first + run.pages) * size] for plane in self._planes)
            self._pool.scatter_tail(pages[: run.pages], here)
