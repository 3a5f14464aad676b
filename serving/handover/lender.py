"""Lends chunks of a pool to processes of this host, which copy them while a lease holds.

    OpenHandOver (RPC) --> offer: socket, ticket      from a caller that may act for every tenant
    socket: ticket --> the pool, to be read           from a process of our own user
    a chunk is ready --> lend: lease, first slot      in the device thread; sent with the answer of the RPC
    socket: give back --> whether the lease held      after the copy; if not, the borrower throws it away

Pages never wait for a borrower: where the pool needs them, leases are called back.
"""

from __future__ import annotations

import logging
import secrets
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from engine.kv.exported import export
from engine.kv.resident import ResidentChunk, ResidentChunks
from serving.handover.door import Door
from serving.handover.leases import Leases
from serving.handover.lent import Lent, Offer
from serving.handover.messages import framed, pool_message
from serving.handover.metrics import LenderMetrics

TICKET_S = 30.0
TICKETS_MAX = 64

log = logging.getLogger(__name__)


class Lender:
    """Lends from the pool of ``residents``. ``post`` runs a function in the device thread, soon.

    ``start`` and ``stop`` come in pairs. ``offer`` may be called from any thread, ``lend`` in the device thread.
    """

    def __init__(
        self,
        residents: ResidentChunks,
        post: Callable[[Callable[[], None]], None],
        metrics: LenderMetrics,
        *,
        lease_s: float,
        directory: Path | None = None,
        uid: int | None = None,
    ) -> None:
        """Raises ``NotExportable`` or ``OSError``."""
        pool = residents.pool
        self.name = secrets.token_hex(16)
        self._residents = residents
        self._post = post
        self._welcome = framed(pool_message(export(pool)))
        self._fds = [] if pool.shared is None else [pool.shared.fd]
        self._leases = Leases(lease_s, freed=self._freed, ended=metrics.lease_ended)
        self._lock = threading.Lock()  # of tickets and sessions
        self._tickets: dict[str, tuple[str, float]] = {}  # borrower, until when; the oldest first
        self._sessions: dict[str, str] = {}  # by borrower
        self._door = Door(self, directory, turned_away=metrics.turned_away, uid=uid)
        metrics.watch(lambda: len(self._leases), lambda: len(self._sessions))
        residents.call_back = self.call_back

    def start(self) -> None:
        self._door.start()

    def stop(self) -> None:
        """Ends every session and lease."""
        self._door.stop()
        self._leases.recall()

    # -- from any thread ----------------------------------------------------------------------------
    def offer(self, borrower: str) -> Offer:
        """A ticket for a borrower, whom the caller has found to be allowed."""
        ticket, now = secrets.token_hex(16), time.monotonic()
        with self._lock:
            self._tickets = {name: each for name, each in self._tickets.items() if each[1] > now}
            while len(self._tickets) >= TICKETS_MAX:
                del self._tickets[next(iter(self._tickets))]
            self._tickets[ticket] = (borrower, now + TICKET_S)
        return Offer(self.name, self._door.path, ticket)

    # -- in the device thread -----------------------------------------------------------------------
    def lend(self, borrower: str, chunk: ResidentChunk) -> Lent:
        """Lends a chunk whose KV is there, or will be once what is launched is over; with lease 0 if it cannot be."""
        self.settle()
        lease, session = 0, self._sessions.get(borrower)
        if session is not None:
            self._residents.hold_still(chunk)
            lease = self._leases.add(session, chunk)
            if not lease:
                self._residents.let_move(chunk)
            elif self._sessions.get(borrower) != session:  # it has left meanwhile, perhaps before there was this lease
                self._leases.end_of(session)
            self._door.wake()
        return Lent(self.name, lease, chunk.first_slot(self._residents.pool.page_size), chunk.tokens)

    def settle(self) -> bool:
        """Lets go of what has been given back; whether there was anything."""
        freed = self._leases.take_freed()
        for chunk in freed:
            self._residents.let_move(chunk)
        return bool(freed)

    def call_back(self) -> bool:
        """Ends every lease for the pool's sake; whether that freed anything."""
        self._leases.recall()
        return self.settle()

    def _freed(self) -> None:
        with suppress(RuntimeError):  # the device thread has ended, and with it the pool
            self._post(self._settle)

    def _settle(self) -> None:
        self.settle()

    # -- in the door's thread -----------------------------------------------------------------------
    def admit(self, ticket: str) -> str | None:
        """A ticket opens one session, of the same name; it takes the place of an earlier one of the same borrower."""
        with self._lock:
            borrower, until = self._tickets.pop(ticket, ("", 0.0))
            if until < time.monotonic():
                return None
            self._sessions[borrower] = ticket
        log.info("hand-over: a borrower has opened the pool")
        return ticket

    def welcome(self) -> tuple[bytes, list[int]]:
        return self._welcome, self._fds

    def give_back(self, session: str, lease: int) -> bool:
        return self._leases.give_back(session, lease)

    def left(self, session: str) -> None:
        with self._lock:
            self._sessions = {borrower: name for borrower, name in self._sessions.items() if name != session}
        self._leases.end_of(session)

    def tick(self) -> float:
        return self._leases.expire()
