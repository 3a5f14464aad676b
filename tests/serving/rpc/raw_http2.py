"""An HTTP/2 client that does what no gRPC library does: half messages, shut windows, streams that never end."""

from __future__ import annotations

import socket
import struct
import time

DATA, HEADERS, RST_STREAM, SETTINGS, PING, GOAWAY, WINDOW_UPDATE = 0, 1, 3, 4, 6, 7, 8
END_STREAM, END_HEADERS, ACK = 1, 4, 1
INITIAL_WINDOW_SIZE = 4


def _frame(kind: int, flags: int, stream: int, payload: bytes = b"") -> bytes:
    return struct.pack(">I", len(payload))[1:] + struct.pack(">BBI", kind, flags, stream) + payload


def _header(name: str, value: str) -> bytes:
    """HPACK: a literal that is not indexed, no Huffman code."""
    return b"\x00" + bytes([len(name)]) + name.encode() + bytes([len(value)]) + value.encode()


def grpc_message(payload: bytes, announced: int | None = None) -> bytes:
    """A message with its prefix; ``announced`` bytes are promised instead of those that come."""
    return b"\x00" + struct.pack(">I", len(payload) if announced is None else announced) + payload


class RawConnection:
    """One connection. ``window`` is what the server may send on each stream before it is given more."""

    def __init__(self, port: int, *, window: int = 65535) -> None:
        self._socket = socket.create_connection(("127.0.0.1", port), 10)
        self._stream = -1
        self._unread = b""
        self.frames: list[tuple[int, int, int, bytes]] = []  # kind, flags, stream, payload
        settings = struct.pack(">HI", INITIAL_WINDOW_SIZE, window)
        self._socket.sendall(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + _frame(SETTINGS, 0, 0, settings))

    def open(self, method: str, data: bytes | None = None, *, end: bool = False) -> int:
        """Opens a stream for ``/package.Service/Method`` and sends ``data``; ``end`` half-closes it."""
        self._stream += 2
        headers = (
            *((":method", "POST"), (":scheme", "http"), (":path", method), (":authority", "localhost")),
            *(("te", "trailers"), ("content-type", "application/grpc")),
        )
        block = b"".join(_header(*pair) for pair in headers)
        sent = _frame(HEADERS, END_HEADERS, self._stream, block)
        if data is not None:
            sent += _frame(DATA, END_STREAM if end else 0, self._stream, data)
        self._socket.sendall(sent)
        return self._stream

    def send(self, stream: int, data: bytes) -> None:
        self._socket.sendall(_frame(DATA, 0, stream, data))

    def widen(self, stream: int, nbytes: int) -> None:
        """Lets the server send more on a stream."""
        self._socket.sendall(_frame(WINDOW_UPDATE, 0, stream, struct.pack(">I", nbytes)))

    def pump(self, seconds: float) -> None:
        """Takes what the server sends for so long, and acknowledges settings and pings."""
        ends_at = time.monotonic() + seconds
        while (left := ends_at - time.monotonic()) > 0:
            self._socket.settimeout(left)
            try:
                received = self._socket.recv(65536)
            except TimeoutError:
                return
            if not received:
                return
            self._unread += received
            self._take_frames()

    def _take_frames(self) -> None:
        while len(self._unread) >= 9:
            length = int.from_bytes(self._unread[:3], "big")
            if len(self._unread) < 9 + length:
                return
            kind, flags, stream = struct.unpack(">BBI", self._unread[3:9])
            payload, self._unread = self._unread[9 : 9 + length], self._unread[9 + length :]
            self.frames.append((kind, flags, stream, payload))
            if kind in (SETTINGS, PING) and not flags & ACK:
                self._socket.sendall(_frame(kind, ACK, 0, payload if kind == PING else b""))

    def ended(self) -> set[int]:
        """Streams that the server has ended."""
        return {s for kind, flags, s, _ in self.frames if kind == RST_STREAM or (flags & END_STREAM and kind < 2)}

    def close(self) -> None:
        self._socket.close()
