"""Messages over a Unix socket: four bytes of length, then one of ``hand_over.proto``; a descriptor may come along.

Reading waits until a deadline and no longer, however slowly bytes come.
"""

from __future__ import annotations

import array
import os
import socket
import struct
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TypeVar

from google.protobuf.message import DecodeError, Message

from engine.kv.exported import CardPlane, ExportedPool
from engine.kv.shared_memory import PlanePlace
from protos import hand_over_pb2

LENGTH = struct.Struct(">I")
TO_LENDER_NBYTES_MAX = 256
TO_BORROWER_NBYTES_MAX = 1 << 20
_CREDENTIALS = struct.Struct("3i")  # pid, uid, gid
_FD_NBYTES = array.array("i").itemsize

MessageT = TypeVar("MessageT", bound=Message)


class Malformed(Exception):
    """What the other side sent is no message."""


class PeerGone(Exception):
    """The other side has closed the connection."""


def framed(message: Message) -> bytes:
    """A message behind its length."""
    body = message.SerializeToString()
    return LENGTH.pack(len(body)) + body


def parsed(kind: type[MessageT], body: bytes) -> MessageT:
    """Raises ``Malformed``."""
    message = kind()
    try:
        message.ParseFromString(body)
    except DecodeError as error:
        raise Malformed(str(error)) from error
    return message


def receive(connection: socket.socket, kind: type[MessageT], deadline: float) -> tuple[MessageT, list[int]]:
    """The next message, and the descriptors that came with it, which are the caller's.

    Raises ``PeerGone``, ``Malformed``, ``TimeoutError`` after the deadline (monotonic clock) and ``OSError``.
    """
    fds: list[int] = []
    try:
        (nbytes,) = LENGTH.unpack(_exactly(connection, LENGTH.size, fds, deadline))
        if nbytes > TO_BORROWER_NBYTES_MAX:
            raise Malformed(f"a message of {nbytes} bytes")
        return parsed(kind, _exactly(connection, nbytes, fds, deadline)), fds
    except BaseException:
        for fd in fds:
            os.close(fd)
        raise


def _exactly(connection: socket.socket, nbytes: int, fds: list[int], deadline: float) -> bytes:
    parts = b""
    while len(parts) < nbytes:
        left_s = deadline - time.monotonic()
        if left_s <= 0:
            raise TimeoutError("no answer in time")
        connection.settimeout(left_s)
        room = socket.CMSG_SPACE(_FD_NBYTES)
        part, ancillary, _, _ = connection.recvmsg(nbytes - len(parts), room, socket.MSG_CMSG_CLOEXEC)
        for level, kind, data in ancillary:
            if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
                found = array.array("i")
                found.frombytes(data[: len(data) - len(data) % _FD_NBYTES])
                fds.extend(found)
        if not part:
            raise PeerGone
        parts += part
    return parts


@contextmanager
def short_name(path: str) -> Iterator[str]:
    """A name of a socket within the block: the kernel takes no more than 107 bytes, paths of directories have more.

    Raises ``OSError`` where there is no such directory.
    """
    fd = os.open(os.path.dirname(path), os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield f"/proc/self/fd/{fd}/{os.path.basename(path)}"
    finally:
        os.close(fd)


def peer_uid(connection: socket.socket) -> int:
    """The user of the process on the other side, as the kernel knows it."""
    _, uid, _ = _CREDENTIALS.unpack(connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size))
    return int(uid)


def pool_message(pool: ExportedPool) -> hand_over_pb2.HandOverPool:
    """An exported pool as a message."""
    message = hand_over_pb2.HandOverPool(layout=pool.layout, slots=pool.slots, card=pool.card)
    message.file.extend(hand_over_pb2.PlaneInFile(at=place.at, nbytes=place.nbytes) for place in pool.file)
    message.planes.extend(
        hand_over_pb2.PlaneOnCard(
            handle=plane.handle,
            storage_nbytes=plane.storage_nbytes,
            storage_at=plane.storage_at,
            counter=plane.counter,
            counter_at=plane.counter_at,
            event=plane.event,
            event_needed=plane.event_needed,
        )
        for plane in pool.planes
    )
    return message


def exported_pool(message: hand_over_pb2.HandOverPool) -> ExportedPool:
    """Inverse of ``pool_message``."""
    return ExportedPool(
        message.layout,
        message.slots,
        tuple(PlanePlace(place.at, place.nbytes) for place in message.file),
        message.card,
        tuple(
            CardPlane(
                *(plane.handle, plane.storage_nbytes, plane.storage_at, plane.counter, plane.counter_at),
                *(plane.event, plane.event_needed),
            )
            for plane in message.planes
        ),
    )
