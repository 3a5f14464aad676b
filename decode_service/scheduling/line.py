"""Who goes next: every rule by which requests are admitted and the device thread's time is shared out.

    Line       of tenants one after the other, of one tenant's requests by priority, then first come first served; one
               that does not fit lets others pass, so many times and no more
    FillRoom   how many may wait for KV, and how many pages they may hold meanwhile
    Turns      how many steps come between two pieces of prefill that run alone

It knows requests and numbers; it neither holds pages nor runs anything.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from enum import Enum
from typing import Protocol, TypeVar

from chunk_store.tenant import Tenant
from decode_service.scheduling.sequence import Sequence
from serving.tenancy.places import Rotation

PASSES_MAX = 16  # how often a request that does not fit lets another one go first
MISFITS_MAX = 8  # requests too large for now that are tried before the rest have to wait
STEPS_A_PIECE = 3  # decode steps after a piece of prefill: most gaps between two tokens have no piece in them
SHORT_PIECE = 8  # pieces below this part of the largest one cost about a decode step, and may come with each


def by_priority(sequences: list[Sequence]) -> list[Sequence]:
    """Each tenant's places among these go to its own by priority, of one priority as they stand.

    What a tenant asks for changes nothing for the others.
    """
    if len({sequence.priority for sequence in sequences}) < 2:
        return list(sequences)
    of: dict[Tenant, list[Sequence]] = defaultdict(list)
    for sequence in sequences:
        of[sequence.tenant].append(sequence)
    ranked = {tenant: iter(sorted(mine, key=lambda one: -one.priority)) for tenant, mine in of.items()}
    return [next(ranked[sequence.tenant]) for sequence in sequences]


class Misfit(Enum):
    """Why a request is not admitted now."""

    PAGES = "pages"  # the pool has not enough
    LOAD = "load"  # its KV has to be read, and there are enough who wait for that
    ASK = "ask"  # its KV has to be computed elsewhere, and there are enough who wait for that


class Entered(Protocol):
    """What admitting a request makes of it."""

    @property
    def takes(self) -> Misfit | None:
        """Which room to wait for KV in it takes: LOAD or ASK, None if its KV is here."""


EnteredT = TypeVar("EnteredT", bound=Entered)


class Line:
    """The requests that wait to be admitted, in the order in which they came.

    ``may_run`` says whether a request may be admitted as far as its tenant's others go, and the places to decode; those
    that may not are not looked at.
    """

    def __init__(self, may_run: Callable[[Sequence], bool] = lambda _: True) -> None:
        self._waiting: list[Sequence] = []
        self._may_run = may_run
        self._rotation = Rotation()

    def __len__(self) -> int:
        return len(self._waiting)

    def __iter__(self) -> Iterator[Sequence]:
        return iter(self._waiting)

    def add(self, sequence: Sequence) -> None:
        self._waiting.append(sequence)

    def put_back(self, sequence: Sequence) -> None:
        """Takes a request in that has been admitted before: where it stood."""
        later = (at for at, other in enumerate(self._waiting) if other.clock.submitted > sequence.clock.submitted)
        self._waiting.insert(next(later, len(self._waiting)), sequence)

    def remove(self, sequence: Sequence) -> None:
        self._waiting.remove(sequence)

    @property
    def asks(self) -> bool:
        """Whether somebody waits to wait for KV that is computed elsewhere."""
        return any(sequence.cold and self._may_run(sequence) for sequence in self._waiting)

    def next(self, admit: Callable[[Sequence, set[Misfit]], EnteredT | Misfit]) -> EnteredT | None:
        """The next request, taken out, as ``admit`` made it enter; None if nobody can now.

        ``admit`` is given a request and the rooms that are kept for requests before it.
        """
        passed: list[tuple[Sequence, Misfit]] = []
        kept: set[Misfit] = set()
        waiting = by_priority(self._waiting)
        for place in self._rotation.order([sequence.tenant for sequence in waiting]):
            sequence = waiting[place]
            if not self._may_run(sequence):
                continue
            found = admit(sequence, kept)
            if not isinstance(found, Misfit):
                for other, misfit in passed:
                    other.passed += misfit in (Misfit.PAGES, found.takes)
                self._waiting.remove(sequence)
                self._rotation.served(sequence.tenant)
                return found
            passed.append((sequence, found))
            if sequence.passed >= PASSES_MAX:
                kept.add(found)
            if Misfit.PAGES in kept or sum(misfit is Misfit.PAGES for _, misfit in passed) == MISFITS_MAX:
                return None
        return None


@dataclass(eq=False)
class Stay:
    """One request's part of the ``FillRoom``: from its admission until it neither waits nor is loaded for."""

    chunk_pages: int
    tail_pages: int
    long: bool = False  # it waits for KV that is being computed, not only read
    loading: bool = False
    waiting: bool = True

    @property
    def room(self) -> Misfit:
        """Which room it takes, and is put off for want of."""
        return Misfit.ASK if self.long else Misfit.LOAD


@dataclass(frozen=True)
class Share:
    """What requests that wait for KV may take together; the first of them may take whatever it needs."""

    requests: int
    chunk_pages: int
    tail_pages: int

    def has_room(self, stays: Iterable[Stay], stay: Stay) -> bool:
        there = list(stays)
        chunk_pages = stay.chunk_pages + sum(other.chunk_pages for other in there)
        tail_pages = stay.tail_pages + sum(other.tail_pages for other in there)
        fits = chunk_pages <= self.chunk_pages and tail_pages <= self.tail_pages
        return not there or (fits and len(there) < self.requests)


class FillRoom:
    """Bounds of what waits for KV.

    At most ``requests_max`` are read for, in a quarter of either region of the pool, and as many wait for KV that is
    computed elsewhere, which may take as long as it likes, in half of either: the rest stays for requests whose KV
    is here.
    """

    def __init__(self, requests_max: int, *, chunk_pages: int, tail_pages: int) -> None:
        self.stays_max = 2 * requests_max
        self._loads = Share(requests_max, chunk_pages // 4, tail_pages // 4)
        self._asks = Share(requests_max, chunk_pages // 2, tail_pages // 2)
        self._stays: set[Stay] = set()

    def enter(self, stay: Stay) -> bool:
        """Takes a stay in; False, and nothing, if there is no room for it now."""
        share = self._asks if stay.long else self._loads
        has_room = share.has_room((other for other in self._stays if other.long == stay.long), stay)
        if has_room:
            self._stays.add(stay)
        return has_room

    def may_ask(self, stay: Stay, *, others_wait: bool) -> bool:
        """Whether what this stay waits for may be computed; it is a long one then.

        ``others_wait``: somebody asked before and was put off.
        """
        if not stay.long and not others_wait:
            stay.long = self._asks.has_room((other for other in self._stays if other.long), stay)
        return stay.long

    def stop_waiting(self, stay: Stay | None) -> None:
        """The request of this stay, if it has one, waits no more."""
        if stay is not None:
            stay.waiting = False
            self._end_if_over(stay)

    def stop_loading(self, stay: Stay | None) -> None:
        """The load of this stay, if it has one, is over."""
        if stay is not None:
            stay.loading = False
            self._end_if_over(stay)

    def _end_if_over(self, stay: Stay) -> None:
        if not stay.waiting and not stay.loading:
            self._stays.discard(stay)


def cost_in_rows(rows: int, piece_tokens: int) -> int:
    """What a piece costs, in rows of the largest one: a forward of few rows takes about as long as a decode step."""
    return max(rows, piece_tokens // SHORT_PIECE)


class Turns:
    """Shares the device between pieces that run alone and steps; ``piece_tokens`` is the largest piece."""

    def __init__(self, piece_tokens: int) -> None:
        self._short = piece_tokens // SHORT_PIECE
        self._steps_owed = 0

    def may_prefill(self, decoding: bool) -> bool:
        """Whether a piece may run now; ``decoding``: somebody waits for a step meanwhile."""
        return not decoding or self._steps_owed == 0

    def prefilled(self, rows: int) -> None:
        """Pieces have run that cost so many rows."""
        self._steps_owed = STEPS_A_PIECE if rows > self._short else 1 if rows else 0

    def stepped(self) -> None:
        """A step has run."""
        self._steps_owed = max(0, self._steps_owed - 1)
