"""Who owns which page of a KV pool: bookkeeping alone, without the memory.

    slots   0 ............ chunk_pages*P | ............ pages*P | scratch
            |  chunk region: runs         | tail region: pages   | one page that padding rows write to

A chunk takes a *run* of neighbouring pages, so that attention reads it as a view and never gathers it; a
tail takes single pages as it needs them. The two regions keep runs from being broken up by tails. Which chunk has a
run, and who may be evicted, is not known here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

FREE, CHUNK, TAIL = "free", "chunk", "tail"


@dataclass(frozen=True)
class PageRun:
    """Neighbouring pages ``first .. first + pages - 1`` of the chunk region."""

    first: int
    pages: int


class PoolError(RuntimeError):
    """The pool's bookkeeping is broken: a page with two owners, or none."""


class PageTable:
    """``pages`` pages of ``page_size`` tokens, the first ``chunk_pages`` for chunks; each has exactly one owner."""

    def __init__(self, *, pages: int, chunk_pages: int, page_size: int) -> None:
        if page_size < 1:
            raise ValueError(f"page_size: {page_size} must be at least 1")
        if not 0 <= chunk_pages <= pages:
            raise ValueError(f"chunk_pages: {chunk_pages} must be in 0..{pages} (pages)")
        self.page_size = page_size
        self.pages = pages
        self.chunk_pages = chunk_pages
        self._owner: list[str] = [FREE] * pages
        self._free_tail_pages = list(range(pages - 1, chunk_pages - 1, -1))
        self._runs: dict[int, PageRun] = {}

    @property
    def scratch_page(self) -> int:
        """The page that belongs to nobody: rows that pad a batch write there, and no row sees what is in it."""
        return self.pages

    def pages_for(self, tokens: int) -> int:
        """Pages that ``tokens`` tokens take."""
        return -(-tokens // self.page_size)

    # -- runs (chunks) ------------------------------------------------------------------------------
    def allocate_run(self, tokens: int) -> PageRun | None:
        """The first gap of the chunk region that holds ``tokens`` tokens, or None if there is none."""
        need = self.pages_for(tokens)
        if need == 0:
            raise ValueError("allocate_run: tokens must be at least 1")
        gap_start = 0
        for run in [*sorted(self._runs.values(), key=lambda r: r.first), PageRun(self.chunk_pages, 0)]:
            if run.first - gap_start >= need:
                return self._take_run(PageRun(gap_start, need))
            gap_start = run.first + run.pages
        return None

    def _take_run(self, run: PageRun) -> PageRun:
        for page in range(run.first, run.first + run.pages):
            if self._owner[page] != FREE:
                raise PoolError(f"page {page} is {self._owner[page]}, expected free")
            self._owner[page] = CHUNK
        self._runs[run.first] = run
        return run

    def release_run(self, run: PageRun) -> None:
        """Gives a run back. Raises ``PoolError`` if it is not allocated."""
        if self._runs.get(run.first) != run:
            raise PoolError(f"{run} is not allocated")
        del self._runs[run.first]
        for page in range(run.first, run.first + run.pages):
            self._owner[page] = FREE

    def move_run(self, run: PageRun, first: int) -> PageRun:
        """Moves a run down to pages ``first ..`` (``first < run.first``; the gap must be free).

        Nothing may read the run's old place afterwards: the caller holds the only users of it.
        """
        if first >= run.first:
            raise ValueError(f"move_run: {first} is not below {run.first}")
        self.release_run(run)
        return self._take_run(PageRun(first, run.pages))

    @property
    def runs(self) -> list[PageRun]:
        """Allocated runs by place."""
        return sorted(self._runs.values(), key=lambda run: run.first)

    # -- pages (tails) ------------------------------------------------------------------------------
    def allocate_pages(self, count: int) -> list[int] | None:
        """``count`` single pages of the tail region, or None (and no page) if there are fewer."""
        if count > len(self._free_tail_pages):
            return None
        pages = [self._free_tail_pages.pop() for _ in range(count)]
        for page in pages:
            if self._owner[page] != FREE:
                raise PoolError(f"page {page} is {self._owner[page]}, expected free")
            self._owner[page] = TAIL
        return pages

    def release_pages(self, pages: Sequence[int]) -> None:
        """Gives tail pages back. Raises ``PoolError`` if one is not a tail's."""
        for page in pages:
            if self._owner[page] != TAIL:
                raise PoolError(f"page {page} is {self._owner[page]}, expected tail")
            self._owner[page] = FREE
            self._free_tail_pages.append(page)

    @property
    def free_tail_pages(self) -> int:
        """Pages that tails can still have."""
        return len(self._free_tail_pages)

    # -- accounting ---------------------------------------------------------------------------------
    def count(self) -> dict[str, int]:
        """Pages by owner: ``free``, ``chunk``, ``tail``."""
        return {owner: self._owner.count(owner) for owner in (FREE, CHUNK, TAIL)}

    def check_integrity(self) -> None:
        """Raises ``PoolError`` unless every page has exactly one owner and the lists agree with the owners."""
        in_runs = [page for run in self._runs.values() for page in range(run.first, run.first + run.pages)]
        if len(set(in_runs)) != len(in_runs):
            raise PoolError("two runs share a page")
        if sorted(in_runs) != [page for page, owner in enumerate(self._owner) if owner == CHUNK]:
            raise PoolError("pages owned by chunks differ from the pages of the runs")
        if len(set(self._free_tail_pages)) != len(self._free_tail_pages):
            raise PoolError("a page is twice in the free list")
        free_tail = [p for p in range(self.chunk_pages, self.pages) if self._owner[p] == FREE]
        if sorted(self._free_tail_pages) != free_tail:
            raise PoolError("the free list differs from the pages without an owner")
