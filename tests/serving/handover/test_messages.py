"""Messages over a socket: whole, with their descriptors, in time, or an error that says which."""

from __future__ import annotations

import os
import socket
import struct
import time

import pytest

from chunk_store.layout import KVLayout, LayerLayout
from engine.kv.exported import CardPlane, ExportedPool
from engine.kv.shared_memory import PlanePlace
from protos import hand_over_pb2
from serving.handover.messages import (
    Malformed,
    PeerGone,
    exported_pool,
    framed,
    peer_uid,
    pool_message,
    receive,
)

LAYOUT = KVLayout("bfloat16", (LayerLayout(2, 3, 5),)).canonical()
GivenBack = hand_over_pb2.HandOverGivenBack


def soon() -> float:
    return time.monotonic() + 20


@pytest.mark.parametrize(
    "pool",
    [
        ExportedPool(LAYOUT, 28, file=(PlanePlace(0, 10), PlanePlace(4096, 20))),
        ExportedPool(
            LAYOUT, 28, card="GPU-1", planes=(CardPlane(b"\0handle", 1 << 33, 512, b"counter", 3, b"event", True),)
        ),
    ],
)
def test_a_pool_is_the_same_behind_the_wire(pool: ExportedPool) -> None:
    message = hand_over_pb2.HandOverPool.FromString(pool_message(pool).SerializeToString())
    assert exported_pool(message) == pool


def test_a_message_that_comes_in_parts_is_one_with_its_descriptor() -> None:
    one, other = socket.socketpair()
    whole = framed(pool_message(ExportedPool(LAYOUT, 28, file=(PlanePlace(0, 10),))))
    read, write = os.pipe()
    socket.send_fds(one, [whole[:3]], [write])
    one.sendall(whole[3:10])
    one.sendall(whole[10:] + framed(GivenBack(held=True)))
    message, fds = receive(other, hand_over_pb2.HandOverPool, soon())
    assert message.slots == 28
    os.write(fds[0], b"x")
    assert os.read(read, 1) == b"x" and not os.get_inheritable(fds[0])
    assert receive(other, GivenBack, soon()) == (GivenBack(held=True), [])
    for fd in (read, write, *fds):
        os.close(fd)
    one.close()
    other.close()


@pytest.mark.parametrize(
    ("sent", "error"),
    [
        (struct.pack(">I", 1 << 30), Malformed),
        (struct.pack(">I", 2) + b"\xff\xff", Malformed),
        (b"\0\0", PeerGone),
        (struct.pack(">I", 5) + b"\x08", PeerGone),
    ],
)
def test_what_is_no_message_is_an_error_and_its_descriptors_are_closed(sent: bytes, error: type[Exception]) -> None:
    one, other = socket.socketpair()
    fds_before = len(os.listdir("/proc/self/fd"))
    socket.send_fds(one, [sent], [1])
    one.close()
    with pytest.raises(error):
        receive(other, GivenBack, soon())
    assert len(os.listdir("/proc/self/fd")) == fds_before - 1
    other.close()


def test_what_does_not_come_in_time_is_not_waited_for() -> None:
    one, other = socket.socketpair()
    one.sendall(b"\0")
    with pytest.raises(TimeoutError):
        receive(other, GivenBack, time.monotonic() + 0.05)
    with pytest.raises(TimeoutError):
        receive(other, GivenBack, time.monotonic() - 1)
    one.close()
    other.close()


def test_the_kernel_knows_who_is_there() -> None:
    one, other = socket.socketpair(socket.AF_UNIX)
    assert peer_uid(one) == os.getuid()
    one.close()
    other.close()
