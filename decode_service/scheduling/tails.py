"""Pages of tails: taken as answers grow, and for whoever is to begin or go on only where those who run leave enough.

    promised   to who is admitted and waits for KV: so many are not promised again, but an answer may grow into them
    taken      by who runs, for its query and what is generated so far
    gone       given back: where every layer has a window, the first pages of a tail, which no row to come sees
    aside      in host memory, the tail of who gave its pages up, while there is room

A tail whose pages go takes them as its prompt is computed, too, so that it never has more than its rows see and one
step writes, however long it gets. One that is to be kept has all of its pages as long as they fit: a chunk is made of
them.

No bytes are moved here: ``take_moves`` says what is to be moved, in the order in which pages changed hands.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from engine.run.room import NO_LIMIT
from engine.sight import EVERYTHING, Sight

if TYPE_CHECKING:  # a page table is all that is needed, with memory or without
    from decode_service.scheduling.sequence import Sequence
    from engine.kv.pages import PageRun, PageTable


@dataclass(frozen=True)
class TailMove:
    """A tail's bytes go from its pages to host memory, or come ``back``."""

    sequence: Sequence
    pages: tuple[int, ...]
    run: PageRun
    back: bool


class Tails:
    """Tail pages of ``pool`` and runs of ``aside``, which is host memory in pages of the same size.

    ``sight``: what rows can see. A step has at most ``piece_tokens`` rows of a prompt that there must be pages for.
    """

    def __init__(self, pool: PageTable, aside: PageTable, sight: Sight = EVERYTHING, *, piece_tokens: int = 1) -> None:
        self._pool = pool
        self._sight = sight
        self._piece_tokens = piece_tokens
        self._given_back = 0
        self._aside = aside
        self._promised: dict[Sequence, int] = {}
        self._running: dict[Sequence, int] = {}  # and the pages that each will have at most
        self._moves: list[TailMove] = []

    @property
    def pages(self) -> int:
        """Pages that there are for tails."""
        return self._pool.pages - self._pool.chunk_pages

    @property
    def tokens_max(self) -> int:
        """Tokens that a tail can have, if nobody else has any."""
        return NO_LIMIT if self._sight.is_limited else self.pages * self._pool.page_size

    def most(self, sequence: Sequence) -> int:
        """Pages that a tail must be able to have at once, to get as long as it may."""
        whole = self._pool.pages_for(sequence.tail_tokens_max)
        if not self._sight.is_limited or sequence.for_chunks:
            return whole
        tokens = self._sight.tokens - 1 + self._rows_next(sequence)  # from any token of a page on
        return min(whole, self._pool.pages_for(tokens - 1) + 1)

    def _may_go(self, sequence: Sequence) -> bool:
        """Whether the first pages of a tail are given back while it goes on."""
        if not self._sight.is_limited or sequence.for_chunks:
            return False
        if sequence.pages_gone or sequence.keep is None or not sequence.keep.copies(sequence.tail_tokens_max):
            return True
        return self._pool.pages_for(max(sequence.tail_tokens_next, sequence.tail_tokens + 1)) > self.pages

    def _rows_next(self, sequence: Sequence) -> int:
        """Rows of a tail that one step must have pages for."""
        return min(len(sequence.composition.tail), self._piece_tokens)

    def need(self, sequence: Sequence) -> int:
        """Pages to begin with, or to go on with."""
        pages = self._pool.pages_for(sequence.tail_tokens_next) - sequence.pages_gone
        return min(pages, self.most(sequence)) if self._may_go(sequence) else pages

    def wanted(self, sequence: Sequence) -> int:
        """Tokens that the pages of who runs must hold before its next rows can be launched."""
        if sequence.may_draw_more:
            return sequence.tail_tokens + 1
        return min(sequence.known_tokens, sequence.tail_tokens + self._rows_next(sequence))

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
        sequence.tail_pages = (*self._gone(sequence.pages_gone), *pages)
        if sequence.aside is not None:
            run, sequence.aside = sequence.aside, None
            self._moves.append(TailMove(sequence, sequence.own_pages, run, back=True))
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

    def pages_unseen(self, sequence: Sequence, tokens: int) -> int:
        """How many of a tail's first pages no row sees that comes behind so many tokens of it."""
        if not self._may_go(sequence):
            return 0
        start = sequence.composition.tail_start
        return max(0, self._sight.first(start + tokens) - start) // self._pool.page_size

    def give_back(self, sequence: Sequence) -> None:
        """Rows were launched: pages that no later one sees are others' from now on."""
        gone = self.pages_unseen(sequence, sequence.tail_tokens)
        if gone > sequence.pages_gone:
            pages = sequence.tail_pages[sequence.pages_gone : gone]
            self._pool.release_pages(pages)
            self._given_back += len(pages)
            sequence.tail_pages = (*self._gone(gone), *sequence.tail_pages[gone:])
            sequence.pages_gone = gone

    def take_given_back(self) -> int:
        """Pages that were given back since the last time, while their tails went on."""
        pages, self._given_back = self._given_back, 0
        return pages

    def begin_behind(self, sequence: Sequence, gone: int) -> None:
        """A tail begins with a copy of another one, without its first ``gone`` pages."""
        sequence.tail_pages = (*self._gone(gone), *sequence.tail_pages)
        sequence.pages_gone = gone

    def _gone(self, pages: int) -> tuple[int, ...]:
        """What stands for pages that are gone."""
        return (self._pool.scratch_page,) * pages

    def put_aside(self, sequence: Sequence) -> bool:
        """Gives a tail's pages back; whether its bytes are kept aside."""
        run, tokens = None, sequence.tail_tokens - sequence.pages_gone * self._pool.page_size
        if tokens and not sequence.bypass:
            run = self._aside.allocate_run(tokens)
        if run is not None:
            self._moves.append(TailMove(sequence, sequence.own_pages[: run.pages], run, back=False))
            sequence.aside = run
        self.release(sequence)
        return run is not None

    def release(self, sequence: Sequence) -> None:
        """Gives back what a request was promised or has taken of the pool."""
        self._promised.pop(sequence, None)
        self._running.pop(sequence, None)
        self._pool.release_pages(sequence.own_pages)
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
