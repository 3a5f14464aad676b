"""The lender's Unix socket: a private directory, one thread, and who is let in.

Let in is a process of our own user that shows a ticket. Whoever does not is closed on, and so is whoever says what is
no message, or does not read what is answered. A connection that ends, however it ends, ends what was lent over it.
"""

from __future__ import annotations

import logging
import os
import secrets
import selectors
import shutil
import socket
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Protocol

from protos import hand_over_pb2
from serving.handover.messages import LENGTH, TO_LENDER_NBYTES_MAX, Malformed, framed, parsed, peer_uid, short_name

PREFIX = "cairn-hand-over-"
CONNECTIONS_MAX = 64
HELLO_S = 5.0  # until a ticket must have been shown

log = logging.getLogger(__name__)


class TurnedAway(StrEnum):
    """Why a connection was closed on."""

    OTHER_USER = "other_user"
    NO_TICKET = "no_ticket"  # or one that is not known, used, or too old
    MALFORMED = "malformed"
    TOO_MANY = "too_many"
    NOT_READING = "not_reading"


class Keeper(Protocol):
    """Who stands behind the door. Called in its thread."""

    def admit(self, ticket: str) -> str | None:
        """The session that a ticket opens, None for one that opens none."""

    def welcome(self) -> tuple[bytes, list[int]]:
        """What is sent to who was let in, with descriptors."""

    def give_back(self, session: str, lease: int) -> bool:
        """Whether the lease held until now."""

    def left(self, session: str) -> None:
        """Nobody is there for the session any more."""

    def tick(self) -> float:
        """Called often; at the latest after so many seconds again."""


@dataclass(eq=False)
class _Connection:
    socket: socket.socket
    hello_by: float
    session: str | None = None
    received: bytearray = field(default_factory=bytearray)


class _Closed(Exception):
    """A connection that is to be closed; why, if that is to be counted."""

    def __init__(self, why: TurnedAway | None = None) -> None:
        super().__init__(why)
        self.why = why


class Door:
    """Listens from ``start`` to ``stop``. ``directory``: where its own, private one is made."""

    def __init__(
        self,
        keeper: Keeper,
        directory: Path | None = None,
        *,
        turned_away: Callable[[TurnedAway], None] = lambda _: None,
        uid: int | None = None,
    ) -> None:
        """Raises ``OSError``."""
        self._keeper = keeper
        self._count = turned_away
        self._uid = os.getuid() if uid is None else uid
        base = Path(tempfile.gettempdir()) if directory is None else directory
        remove_left(base)
        self.directory = Path(tempfile.mkdtemp(prefix=PREFIX, dir=base))  # of mode 0700
        self.path = str(self.directory / secrets.token_hex(8))
        self._connections: set[_Connection] = set()
        self._selector = selectors.DefaultSelector()
        self._woken, self._wake = socket.socketpair()
        self._listening = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._stopping = False
        self._thread = threading.Thread(target=self._loop, name="hand-over", daemon=True)
        try:
            self._listen()
        except BaseException:
            self._close()
            raise

    def _listen(self) -> None:
        self._listening.setblocking(False)
        with short_name(self.path) as name:
            self._listening.bind(name)
        self._listening.listen(CONNECTIONS_MAX)
        self._selector.register(self._listening, selectors.EVENT_READ)
        self._selector.register(self._woken, selectors.EVENT_READ)

    def start(self) -> None:
        self._thread.start()

    def wake(self) -> None:
        """Has ``tick`` called soon. From any thread."""
        with suppress(OSError):
            self._wake.send(b"\0", socket.MSG_DONTWAIT)

    def stop(self) -> None:
        """Closes every connection, ends the thread and removes the directory."""
        self._stopping = True
        self.wake()
        if self._thread.is_alive():
            self._thread.join(HELLO_S)
        self._close()

    def _close(self) -> None:
        for connection in list(self._connections):
            self._end(connection, None)
        for each in (self._listening, self._woken, self._wake):
            each.close()
        self._selector.close()
        shutil.rmtree(self.directory, ignore_errors=True)

    # -- in the thread ------------------------------------------------------------------------------
    def _loop(self) -> None:
        while not self._stopping:
            wait_s = min([self._keeper.tick(), *(self._hello_left_s(each) for each in self._connections)])
            for key, _ in self._selector.select(max(0.0, wait_s)):
                if key.fileobj is self._listening:
                    self._accept()
                elif key.fileobj is self._woken:
                    self._woken.recv(4096)
                else:
                    self._guarded(key.data, self._read)
            for connection in [each for each in self._connections if self._hello_left_s(each) <= 0]:
                self._end(connection, TurnedAway.NO_TICKET)

    def _hello_left_s(self, connection: _Connection) -> float:
        return HELLO_S if connection.session is not None else connection.hello_by - time.monotonic()

    def _accept(self) -> None:
        try:
            accepted, _ = self._listening.accept()
        except OSError as error:  # gone already, or no descriptor is left
            log.warning("hand-over: a connection could not be accepted: %s", error)
            time.sleep(0.01)
            return
        accepted.setblocking(False)
        connection = _Connection(accepted, time.monotonic() + HELLO_S)
        self._connections.add(connection)
        self._selector.register(accepted, selectors.EVENT_READ, connection)
        self._guarded(connection, self._check)

    def _guarded(self, connection: _Connection, step: Callable[[_Connection], None]) -> None:
        try:
            step(connection)
        except BlockingIOError:
            pass
        except _Closed as closed:
            self._end(connection, closed.why)
        except Malformed:
            self._end(connection, TurnedAway.MALFORMED)
        except OSError:
            self._end(connection, None)

    def _check(self, connection: _Connection) -> None:
        if peer_uid(connection.socket) != self._uid:
            raise _Closed(TurnedAway.OTHER_USER)
        if len(self._connections) > CONNECTIONS_MAX:
            raise _Closed(TurnedAway.TOO_MANY)

    def _read(self, connection: _Connection) -> None:
        part = connection.socket.recv(4096)
        if not part:
            raise _Closed
        connection.received += part
        while (body := _take(connection.received)) is not None:
            if connection.session is None:
                self._admit(connection, parsed(hand_over_pb2.HandOverHello, body))
            else:
                asked = parsed(hand_over_pb2.HandOverGiveBack, body)
                held = self._keeper.give_back(connection.session, asked.lease)
                self._send(connection, framed(hand_over_pb2.HandOverGivenBack(held=held)), [])

    def _admit(self, connection: _Connection, hello: hand_over_pb2.HandOverHello) -> None:
        session = self._keeper.admit(hello.ticket)
        if session is None:
            raise _Closed(TurnedAway.NO_TICKET)
        connection.session = session
        self._send(connection, *self._keeper.welcome())

    def _send(self, connection: _Connection, message: bytes, fds: list[int]) -> None:
        """All of it at once: who has left so much unread that it does not fit does not read."""
        try:
            sent = socket.send_fds(connection.socket, [message], fds)
        except BlockingIOError:
            sent = 0
        if sent < len(message):
            raise _Closed(TurnedAway.NOT_READING)

    def _end(self, connection: _Connection, why: TurnedAway | None) -> None:
        self._connections.discard(connection)
        with suppress(KeyError, ValueError):
            self._selector.unregister(connection.socket)
        connection.socket.close()
        if why is not None:
            log.warning("hand-over: a connection was closed: %s", why)
            self._count(why)
        if connection.session is not None:
            self._keeper.left(connection.session)


def _take(received: bytearray) -> bytes | None:
    """The next message's body, taken out of what was received. Raises ``Malformed`` for one that is too long."""
    if len(received) < LENGTH.size:
        return None
    (nbytes,) = LENGTH.unpack_from(received)
    if nbytes > TO_LENDER_NBYTES_MAX:
        raise Malformed(f"a message of {nbytes} bytes")
    if len(received) < LENGTH.size + nbytes:
        return None
    body = bytes(received[LENGTH.size : LENGTH.size + nbytes])
    del received[: LENGTH.size + nbytes]
    return body


def remove_left(base: Path) -> None:
    """Removes the directories of doors whose process was killed: nobody listens there any more."""
    for directory in base.glob(f"{PREFIX}*"):
        with suppress(OSError):
            if directory.stat().st_uid != os.getuid() or directory.is_symlink():
                continue
            if not any(_listens(path) for path in directory.iterdir()):
                shutil.rmtree(directory, ignore_errors=True)


def _listens(path: Path) -> bool:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.setblocking(False)
        try:
            with short_name(str(path)) as name:
                probe.connect(name)
        except (ConnectionRefusedError, FileNotFoundError):
            return False
        except OSError:
            return True
    return True
