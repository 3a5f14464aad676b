"""The borrower's side of one connection to a lender."""

from __future__ import annotations

import os
import select
import socket
import threading
import time
from collections.abc import Sequence
from contextlib import suppress

import torch
from torch import Tensor

from chunk_store.layout import KVLayout
from engine.kv.borrowed import BorrowedPool, NotReadable, open_pool
from protos import hand_over_pb2
from serving.handover.lent import Lent, NoSession, Offer, Refusal
from serving.handover.messages import Malformed, PeerGone, exported_pool, framed, peer_uid, receive, short_name

OPEN_S = 5.0  # for all of the greeting
ANSWER_S = 2.0  # for a lease that is given back


class NotOpened(Exception):
    """There is no session, and why."""

    def __init__(self, why: NoSession, detail: str = "") -> None:
        super().__init__(f"{why} ({detail})" if detail else str(why))
        self.why = why


class Session:
    """A lender's pool, open, and the connection over which leases are given back. Used by many threads."""

    def __init__(self, connection: socket.socket, pool: BorrowedPool, answer_s: float = ANSWER_S) -> None:
        self._connection = connection
        self._pool = pool
        self._answer_s = answer_s
        self._lock = threading.Lock()  # one question and its answer at a time
        self._lost: Refusal | None = None

    @property
    def lost(self) -> bool:
        """Whether the connection is of no use any more, as far as is known without waiting."""
        if self._lost is None and self._lock.acquire(blocking=False):
            try:
                if self._ended():
                    self._lost = Refusal.PEER_GONE
                    self._connection.close()
            finally:
                self._lock.release()
        return self._lost is not None

    def _ended(self) -> bool:
        """Whether the lender has closed the connection: nothing comes from it unasked."""
        looking = select.poll()
        try:
            looking.register(self._connection, select.POLLIN)
        except (OSError, ValueError):  # closed on our side
            return True
        return bool(looking.poll(0))

    def copy(self, lent: Lent, planes: Sequence[Tensor], after: torch.cuda.Event | None) -> Refusal | None:
        """Copies what is lent into ``planes`` and gives it back; why they must not be used, if so."""
        if self._lost is not None:
            return self._lost
        try:
            self._pool.copy(lent.first_slot, lent.tokens, planes, after=after)
        except (ValueError, RuntimeError):
            self.give_back(lent.lease)
            return Refusal.NOT_COPIED
        return self.give_back(lent.lease)

    def give_back(self, lease: int) -> Refusal | None:
        """Ends a lease; None if it had held until now."""
        with self._lock:
            if self._lost is not None:
                return self._lost
            try:
                held = self._ask(lease)
            except TimeoutError:
                self._lost = Refusal.NO_ANSWER
            except (OSError, PeerGone, Malformed):
                self._lost = Refusal.PEER_GONE
            else:
                return None if held else Refusal.LEASE_LOST
            self._connection.close()
            return self._lost

    def _ask(self, lease: int) -> bool:
        deadline = time.monotonic() + self._answer_s
        self._connection.settimeout(self._answer_s)
        self._connection.sendall(framed(hand_over_pb2.HandOverGiveBack(lease=lease)))
        answer, fds = receive(self._connection, hand_over_pb2.HandOverGivenBack, deadline)
        _close_all(fds)
        return answer.held

    def close(self) -> None:
        """The lender takes back what was lent. Who still copies may go on; it will not be used."""
        with suppress(OSError):  # ends whoever waits for an answer, before the lock is asked for
            self._connection.shutdown(socket.SHUT_RDWR)
        with self._lock:
            self._lost = self._lost or Refusal.PEER_GONE
            self._connection.close()


def open_session(
    offer: Offer, layout: KVLayout, device: torch.device, *, uid: int | None = None, open_s: float = OPEN_S
) -> Session:
    """Opens a lender's pool for copies into a pool of ``layout`` on ``device``. Raises ``NotOpened``."""
    deadline = time.monotonic() + open_s
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    connection.settimeout(open_s)
    try:
        return Session(connection, _greet(connection, offer, layout, device, _own(uid), deadline))
    except BaseException:
        connection.close()
        raise


def _own(uid: int | None) -> int:
    return os.getuid() if uid is None else uid


def _greet(
    connection: socket.socket, offer: Offer, layout: KVLayout, device: torch.device, uid: int, deadline: float
) -> BorrowedPool:
    fds: list[int] = []
    try:
        _connect(connection, offer.socket)
        if peer_uid(connection) != uid:
            raise NotOpened(NoSession.OTHER_USER)
        connection.sendall(framed(hand_over_pb2.HandOverHello(ticket=offer.ticket)))
        message, fds = receive(connection, hand_over_pb2.HandOverPool, deadline)
        return open_pool(exported_pool(message), fds[0] if fds else None, layout, device)
    except TimeoutError as error:
        raise NotOpened(NoSession.NO_ANSWER) from error
    except (OSError, PeerGone, Malformed) as error:
        raise NotOpened(NoSession.TURNED_AWAY, str(error)) from error
    except NotReadable as error:
        raise NotOpened(NoSession.NOT_READABLE, str(error)) from error
    finally:
        _close_all(fds)


def _connect(connection: socket.socket, path: str) -> None:
    try:
        with short_name(path) as name:
            connection.connect(name)
    except TimeoutError:
        raise
    except (OSError, ValueError) as error:  # no such socket, nobody behind it, not ours to open, no path at all
        raise NotOpened(NoSession.UNREACHABLE, str(error)) from error


def _close_all(fds: Sequence[int]) -> None:
    for fd in fds:
        os.close(fd)
