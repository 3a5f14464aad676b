"""Server-sent events out of bytes that are cut anywhere."""

from __future__ import annotations

DATA = b"data:"
EVENT_MAX = 8 << 20  # bytes of one


class EventReader:
    """Puts a stream's pieces together."""

    def __init__(self) -> None:
        self._rest = b""
        self._data: list[bytes] = []

    def feed(self, piece: bytes) -> list[bytes]:
        """The data of each event that ends in this piece. Raises ``ValueError`` for one that has no end."""
        *lines, self._rest = (self._rest + piece).split(b"\n")
        if len(self._rest) + sum(map(len, self._data)) > EVENT_MAX:
            raise ValueError(f"an event of more than {EVENT_MAX} bytes")
        ended = []
        for line in lines:
            line = line.rstrip(b"\r")
            if line.startswith(DATA):
                self._data.append(line.removeprefix(DATA).removeprefix(b" "))
            elif not line and self._data:
                ended.append(b"\n".join(self._data))
                self._data = []
        return ended
