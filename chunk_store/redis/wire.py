"""Large values to and from Redis without copies: sent from where they lie, received where they belong.

The Redis client packs every value into one more buffer on the way out and builds a new object for it on the way in.
For values of megabytes that costs more than the network; this module speaks just enough of the protocol (AUTH, SELECT,
SET, GET) to scatter and gather instead. Everything small goes through the ordinary client (``connection.py``).
"""

from __future__ import annotations

import socket
import ssl
import threading
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from typing import TypeVar

from chunk_store.errors import StoreUnavailable
from chunk_store.redis.connection import TIMEOUT_S, RedisAddress, ServerFull

IDLE_MAX = 8
SPANS_PER_CALL = 512  # the kernel takes at most 1024
VALUE_NBYTES_MAX = 512 * 2**20

_T = TypeVar("_T")


class _Refused(Exception):
    """The server answered with an error."""


class RedisWire:
    """A pool of sockets to one server. Thread-safe."""

    def __init__(self, address: RedisAddress) -> None:
        self._address = address
        self._idle: list[RedisSocket] = []
        self._lock = threading.Lock()

    def run(self, step: Callable[[RedisSocket], _T]) -> _T:
        """Runs ``step``, once more on a new socket when an idle one turns out to be dead.

        Raises ``StoreUnavailable``, of a server without memory ``ServerFull``.
        """
        with self._lock:
            wire = self._idle.pop() if self._idle else None
        if wire is not None:
            with suppress(OSError):
                return self._run(wire, step)
            self.close()  # the others are as old
        try:
            return self._run(RedisSocket(self._address), step)
        except (OSError, _Refused) as error:  # refused at login; _run translates the later ones
            raise StoreUnavailable(f"{self._where()}: {error}") from error

    def close(self) -> None:
        with self._lock:
            idle, self._idle = self._idle, []
        for wire in idle:
            wire.close()

    def _run(self, wire: RedisSocket, step: Callable[[RedisSocket], _T]) -> _T:
        try:
            answer = step(wire)
        except _Refused as error:
            wire.close()  # later answers of the batch may still be on their way
            kind = ServerFull if str(error).startswith("OOM") else StoreUnavailable
            raise kind(f"{self._where()}: {error}") from error
        except BaseException:
            wire.close()
            raise
        with self._lock:
            if len(self._idle) < IDLE_MAX:
                self._idle.append(wire)
                return answer
        wire.close()
        return answer

    def _where(self) -> str:
        return f"redis at {self._address.host}:{self._address.port}"


class RedisSocket:
    """One authenticated connection, used by one thread at a time."""

    def __init__(self, address: RedisAddress) -> None:
        plain = socket.create_connection((address.host, address.port), timeout=TIMEOUT_S)
        plain.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._socket = plain
        self._pending = bytearray()
        try:
            if address.tls:
                context = ssl.create_default_context(cafile=address.ca_file)
                self._socket = context.wrap_socket(plain, server_hostname=address.host)
            user = [address.username] if address.username else []
            if address.password:
                self._call("AUTH", *user, address.password)
            if address.db:
                self._call("SELECT", str(address.db))
        except BaseException:
            self.close()
            raise

    def set(self, values: Sequence[tuple[str, Sequence[memoryview | bytes]]]) -> None:
        """Stores each value, given in spans; all of them in flight at once."""
        for name, spans in values:
            nbytes = sum(len(span) for span in spans)
            head = b"*3\r\n$3\r\nSET\r\n" + _bulk(name) + b"$%d\r\n" % nbytes
            self._send([head, *(spans if len(spans) <= SPANS_PER_CALL else [b"".join(spans)]), b"\r\n"])
        for _ in values:
            self._status()

    def get(
        self, whole: str | None, names: Sequence[str], targets: Sequence[Sequence[memoryview]]
    ) -> tuple[bytes | None, list[int | None]]:
        """``whole`` as bytes, and the values of ``names`` into ``targets``; returns the values' sizes.

        None where there is no value. A value of another size than its target is skipped.
        """
        asked = names if whole is None else (whole, *names)
        self._send([b"".join(b"*2\r\n$3\r\nGET\r\n" + _bulk(name) for name in asked)])
        size = None if whole is None else self._bulk_size()
        first = None if size is None else self._take(size)
        return first, [self._receive(target) for target in targets]

    def close(self) -> None:
        with suppress(OSError):
            self._socket.close()

    def _call(self, *words: str) -> None:
        self._send([b"*%d\r\n" % len(words), *(_bulk(word) for word in words)])
        self._status()

    def _send(self, spans: Sequence[memoryview | bytes]) -> None:
        if isinstance(self._socket, ssl.SSLSocket):  # has no sendmsg
            for span in spans:
                self._socket.sendall(span)
            return
        for at in range(0, len(spans), SPANS_PER_CALL):
            left = [memoryview(span) for span in spans[at : at + SPANS_PER_CALL]]
            while left:
                left = _unsent(left, self._socket.sendmsg(left))

    def _receive(self, target: Sequence[memoryview]) -> int | None:
        size = self._bulk_size()
        if size is None:
            return None
        if size == sum(len(span) for span in target):
            for span in target:
                self._fill(span)
            self._end_of_bulk()
        else:
            self._take(size)
        return size

    def _bulk_size(self) -> int | None:
        line = self._line()
        if not line.startswith(b"$"):
            raise ConnectionError(f"expected a value, got {line[:40]!r}")
        size = int(line[1:])
        if size > VALUE_NBYTES_MAX:
            raise ConnectionError(f"a value of {size} bytes")
        return None if size < 0 else size

    def _status(self) -> None:
        line = self._line()
        if not line.startswith(b"+"):
            raise ConnectionError(f"expected a status, got {line[:40]!r}")

    def _line(self) -> bytes:
        """One line of the protocol. Raises ``_Refused`` for an error line."""
        while b"\r\n" not in self._pending:
            more = self._socket.recv(4096)
            if not more:
                raise ConnectionError("the server closed the connection")
            self._pending += more
        line, _, rest = bytes(self._pending).partition(b"\r\n")
        self._pending = bytearray(rest)
        if line.startswith(b"-"):
            raise _Refused(line[1:].decode(errors="replace"))
        return line

    def _take(self, size: int) -> bytes:
        value = bytearray(size)
        self._fill(memoryview(value))
        self._end_of_bulk()
        return bytes(value)

    def _end_of_bulk(self) -> None:
        end = bytearray(2)
        self._fill(memoryview(end))

    def _fill(self, view: memoryview) -> None:
        taken = min(len(view), len(self._pending))
        view[:taken] = self._pending[:taken]
        del self._pending[:taken]
        while taken < len(view):
            received = self._socket.recv_into(view[taken:])
            if not received:
                raise ConnectionError("the server closed the connection")
            taken += received


def _bulk(word: str) -> bytes:
    raw = word.encode()
    return b"$%d\r\n%b\r\n" % (len(raw), raw)


def _unsent(spans: Iterable[memoryview], sent: int) -> list[memoryview]:
    """What is left of ``spans`` after the first ``sent`` bytes went out."""
    left = []
    for span in spans:
        if sent >= len(span):
            sent -= len(span)
        else:
            left.append(span[sent:])
            sent = 0
    return left
