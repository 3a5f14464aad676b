"""Pages of tails: taken as answers grow, and for whoever is to begin or go on only where those who run leave enough.

    promised   to who is admitted and waits for KV: so many are not promised again, but an answer may grow into them
    taken      by who runs, for its query and what is generated so far
    aside      in host memory, the tail of who gave its pages up, while there is room

No bytes are moved here: ``take_moves`` says what is to be moved, in the order in which pages changed hands.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # a page table is all that is needed, with memory or without
    from decode_service.sequence import Sequence
    from engine.kv.pages import PageRun, PageTable


@dataclass(frozen=True)
class TailMove:
    """A tail's bytes go from its pages to host memory, or come ``back``."""

    sequence: Sequence
    pages: tuple[int, ...]
    run: PageRun
    back: bool


class Tails:
    """Tail pages of ``pool`` and runs of ``aside``, which is host memory in pages of the same size."""

    def __init__(self, pool: PageTable, aside: PageTable) -> None:
        self._pool = pool
        self._aside = aside
        self._promised: dict[Sequence, int] = {}
        self._running: dict[Sequence, int] = {}  # and the pages that each will have at most
        self._moves: list[TailMove] = []

    @property
    def pages(self) -> int:
        """Pages that there are for tails."""
        return self._pool.pages - self._pool.chunk_pages

    def need(self, sequence: Sequence) -> int:
        """Pages to begin with, or to go on with."""
        return self._pool.pages_for(sequence.tail_tokens_next)

    def promise(self, sequence: Sequence) -> bool:
        """Pages for a request that is admitted; False, and nothing, if they are wanted otherwise."""
        need = self.need(sequence)
        if need and need + self._growing() + sum(self._promised.values()) > self._pool.free_tail_pages:
            return False
        self._promised[sequence] = need
        return True

    def take(self, sequence: Sequence) -> bool:
        """The pages that a request begins or goes on with; False, and none, if too few are left for those who run."""
        need = self.need(sequence)
        if need + self._growing() > self._pool.free_tail_pages:
            return False
        pages = self._pool.allocate_pages(need)
        assert pages is not None
        self._promised.pop(sequence, None)
        self._running[sequence] = self._pool.pages_for(sequence.tail_tokens_max)
        sequence.tail_pages = tuple(pages)
        if sequence.aside is not None:
            run, sequence.aside = sequence.aside, None
            self._moves.append(TailMove(sequence, sequence.tail_pages, run, back=True))
            self._aside.release_run(run)
        return True

    def _growing(self) -> int:
        """How many of those who run may want one more page before long."""
        return sum(len(sequence.tail_pages) < most for sequence, most in self._running.items())

    def has_room(self, sequence: Sequence, tokens: int) -> bool:
        """Whether a tail's pages hold so many tokens."""
        return tokens <= len(sequence.tail_pages) * self._pool.page_size

    def grow(self, sequence: Sequence, tokens: int) -> bool:
        """Takes the page that so many tokens need; False if there is none."""
        pages = self._pool.allocate_pages(self._pool.pages_for(tokens) - len(sequence.tail_pages))
        if pages is None:
            return False
        sequence.tail_pages = (*sequence.tail_pages, *pages)
        return True

    def room_for(self, sequence: Sequence, tokens: int) -> int:
        """How many tokens a tail may have at once, at most ``tokens``: takes pages for them that nobody else wants."""
        if not self.has_room(sequence, tokens):
            lacks = self._pool.pages_for(tokens) - len(sequence.tail_pages)
            if lacks + self._growing() <= self._pool.free_tail_pages:
                self.grow(sequence, tokens)
        return min(tokens, len(sequence.tail_pages) * self._pool.page_size)

    def put_aside(self, sequence: Sequence) -> bool:
        """Gives a tail's pages back; whether its bytes are kept aside."""
        run = None
        if sequence.tail_tokens and not sequence.bypass:
            run = self._aside.allocate_run(sequence.tail_tokens)
        if run is not None:
            self._moves.append(TailMove(sequence, sequence.tail_pages[: run.pages], run, back=False))
            sequence.aside = run
        self.release(sequence)
        return run is not None

    def release(self, sequence: Sequence) -> None:
        """Gives back what a request was promised or has taken of the pool."""
        self._promised.pop(sequence, None)
        self._running.pop(sequence, None)
        self._pool.release_pages(sequence.tail_pages)
        sequence.tail_pages = ()

    def forget(self, sequence: Sequence) -> None:
        """Nobody wants what is aside."""
        if sequence.aside is not None:
            self._aside.release_run(sequence.aside)
            sequence.aside = None

    def take_moves(self) -> tuple[TailMove, ...]:
        """What is to be moved since the last time, before anything else is launched."""
        moves, self._moves = tuple(self._moves), []
        return moves
