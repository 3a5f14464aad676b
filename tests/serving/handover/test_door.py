"""Who is let in at the lender's socket, and what becomes of everybody else."""

from __future__ import annotations

import fcntl
import mmap
import os
import socket
import stat
import struct
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from protos import hand_over_pb2
from serving.handover import door, lender
from serving.handover.door import PREFIX
from serving.handover.lent import NoSession, Offer
from serving.handover.messages import framed, receive, short_name
from serving.handover.session import NotOpened, open_session
from tests.serving.handover.lending import LAYOUT, Borrowing, Lending, lending, until

CPU = torch.device("cpu")


def knock(offer: Offer, *, timeout_s: float = 20.0) -> socket.socket:
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    connection.settimeout(timeout_s)
    with short_name(offer.socket) as name:
        connection.connect(name)
    return connection


def closed(connection: socket.socket) -> bool:
    """Whether the other side closes; nothing but that comes."""
    try:
        return connection.recv(1) == b""
    except ConnectionError:
        return True


def why_not(offer: Offer, uid: int | None = None) -> NoSession:
    with pytest.raises(NotOpened) as caught:
        open_session(offer, LAYOUT, CPU, uid=uid, open_s=5.0)
    return caught.value.why


def turned_away(lender: Lending, reason: str) -> float:
    return lender.value("cairn_hand_over_turned_away_total", reason=reason)


def test_another_user_is_closed_on_before_anything_is_read(tmp_path: Path) -> None:
    with lending(tmp_path, uid=os.getuid() + 1) as other:
        assert why_not(other.lender.offer("one")) is NoSession.TURNED_AWAY
        until(lambda: turned_away(other, "other_user") == 1)
        assert other.value("cairn_hand_over_borrowers") == 0


def test_a_lender_of_another_user_is_told_nothing(tmp_path: Path) -> None:
    with lending(tmp_path) as other:
        offer = other.lender.offer("one")
        assert why_not(offer, uid=os.getuid() + 1) is NoSession.OTHER_USER
        open_session(offer, LAYOUT, CPU).close()  # the ticket was not shown


@pytest.mark.skipif(os.getuid() != 0, reason="only root becomes somebody else")
def test_the_kernel_says_who_is_there() -> None:
    """Another user cannot reach the socket; one who could would be found out by his credentials."""
    with tempfile.TemporaryDirectory(dir="/tmp") as directory, lending(Path(directory)) as mine:
        os.chmod(directory, 0o755)
        offer = mine.lender.offer("one")
        for reachable in (False, True):
            if reachable:
                for part in (Path(offer.socket).parent, Path(offer.socket)):
                    os.chmod(part, 0o777)
            child = os.posix_spawn(
                "/usr/bin/env",
                ["env", "python3", "-c", KNOCK, offer.socket, offer.ticket],
                os.environ,
            )
            _, status = os.waitpid(child, 0)
            assert os.waitstatus_to_exitcode(status) == 0, "it got something"
        until(lambda: turned_away(mine, "other_user") == 1)


KNOCK = """
import os, socket, struct, sys
os.setgid(65534); os.setuid(65534)
s = socket.socket(socket.AF_UNIX); s.settimeout(10)
try:
    os.chdir(os.path.dirname(sys.argv[1])); s.connect(os.path.basename(sys.argv[1]))
    ticket = sys.argv[2].encode(); body = b"\\x0a" + bytes([len(ticket)]) + ticket
    s.sendall(struct.pack(">I", len(body)) + body)
    sys.exit(s.recv(1) != b"")
except OSError:
    sys.exit(0)
"""


def test_a_ticket_opens_once_and_not_for_long(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with lending(tmp_path) as lent:
        offer = lent.lender.offer("one")
        session = open_session(offer, LAYOUT, CPU)
        assert why_not(offer) is NoSession.TURNED_AWAY
        assert why_not(Offer(offer.pool, offer.socket, "")) is NoSession.TURNED_AWAY
        assert why_not(Offer(offer.pool, offer.socket, "0" * 32)) is NoSession.TURNED_AWAY
        monkeypatch.setattr(lender, "TICKET_S", 0.0)
        assert why_not(lent.lender.offer("one")) is NoSession.TURNED_AWAY
        until(lambda: turned_away(lent, "no_ticket") == 4)
        session.close()


def test_only_so_many_tickets_are_out_at_a_time(tmp_path: Path) -> None:
    with lending(tmp_path) as lent:
        offers = [lent.lender.offer(f"borrower {n}") for n in range(lender.TICKETS_MAX + 1)]
        assert why_not(offers[0]) is NoSession.TURNED_AWAY
        open_session(offers[-1], LAYOUT, CPU).close()


@pytest.mark.parametrize(
    "sent",
    [struct.pack(">I", 1 << 31), struct.pack(">I", 300), struct.pack(">I", 4) + b"\xff\xff\xff\xff"],
    ids=["two gigabytes", "too long", "no message"],
)
def test_who_says_what_is_no_message_is_closed_on(tmp_path: Path, sent: bytes) -> None:
    with lending(tmp_path) as lent:
        connection = knock(lent.lender.offer("one"))
        connection.sendall(sent)
        assert closed(connection)
        connection.close()
        until(lambda: turned_away(lent, "malformed") == 1)


def test_who_says_nothing_is_closed_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(door, "HELLO_S", 0.1)
    with lending(tmp_path) as lent:
        silent = knock(lent.lender.offer("one"))
        half = knock(lent.lender.offer("one"))
        half.sendall(struct.pack(">I", 40) + b"\x0a")
        assert closed(silent) and closed(half)
        silent.close()
        half.close()


def test_there_are_only_so_many_connections_and_the_rest_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(door, "CONNECTIONS_MAX", 3)
    with lending(tmp_path) as lent:
        offer = lent.lender.offer("one")
        session = open_session(offer, LAYOUT, CPU)
        silent = [knock(offer) for _ in range(4)]
        until(lambda: turned_away(lent, "too_many") == 2)
        assert session.give_back(7) is not None and not session.lost, "who was let in is served"
        for connection in silent:
            connection.close()
        until(lambda: len(lent.lender._door._connections) == 1)
        session.close()


def test_who_does_not_read_is_closed_on(tmp_path: Path) -> None:
    with lending(tmp_path) as lent:
        offer = lent.lender.offer("one")
        connection = knock(offer)
        connection.sendall(framed(hand_over_pb2.HandOverHello(ticket=offer.ticket)))
        asked = framed(hand_over_pb2.HandOverGiveBack(lease=1)) * 1000

        def flood() -> None:
            with pytest.raises(OSError):
                while True:
                    connection.sendall(asked)

        flooding = threading.Thread(target=flood)
        flooding.start()
        until(lambda: turned_away(lent, "not_reading") == 1)
        flooding.join(30)
        connection.close()
        assert lent.value("cairn_hand_over_borrowers") == 0


def test_the_memory_can_be_read_and_nothing_else(tmp_path: Path) -> None:
    with lending(tmp_path) as lent:
        offer = lent.lender.offer("one")
        connection = knock(offer)
        connection.sendall(framed(hand_over_pb2.HandOverHello(ticket=offer.ticket)))
        message, (fd,) = receive(connection, hand_over_pb2.HandOverPool, time.monotonic() + 20)
        assert message.slots == lent.pool.slots
        refused: list[Callable[[], object]] = [
            lambda: mmap.mmap(fd, 4096),
            lambda: os.pwrite(fd, b"x", 0),
            lambda: os.ftruncate(fd, 0),
            lambda: fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_WRITE),
            lambda: mmap.mmap(os.open(f"/proc/self/fd/{fd}", os.O_RDWR), 4096),
        ]
        for attempt in refused:
            with pytest.raises(OSError):
                attempt()
        assert mmap.mmap(fd, 4096, prot=mmap.PROT_READ)[0] in range(256)
        os.close(fd)
        connection.close()


def test_what_a_killed_lender_left_behind_is_removed_and_what_is_in_use_stays(tmp_path: Path) -> None:
    left = tmp_path / f"{PREFIX}left"
    left.mkdir()
    with socket.socket(socket.AF_UNIX) as gone, short_name(str(left / "socket")) as name:
        gone.bind(name)
    foreign = tmp_path / "somebody-elses"
    foreign.mkdir()
    with lending(tmp_path) as first:
        assert not left.exists() and foreign.exists()
        with lending(tmp_path) as second:
            for each in (first, second):
                directory = Path(each.lender.offer("one").socket).parent
                assert stat.S_IMODE(directory.stat().st_mode) == 0o700
                Borrowing(each.lender.offer).opened().borrower.close()
    assert [path.name for path in tmp_path.iterdir()] == ["somebody-elses"]
