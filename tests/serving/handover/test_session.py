"""A session that cannot be opened says why; one that was says when it is over."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from protos import hand_over_pb2
from serving.handover.lent import Lent, NoSession, Offer, Refusal
from serving.handover.messages import framed
from serving.handover.session import NotOpened, Session, open_session
from tests.serving.handover.lending import LAYOUT, bits, lending

CPU = torch.device("cpu")


@contextmanager
def listening(directory: Path, answer: bytes | None) -> Iterator[Offer]:
    """A lender that answers a borrower's first message with these bytes, or never."""
    path = directory / "socket"
    done = threading.Event()
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()

        def serve() -> None:
            accepted, _ = listener.accept()
            accepted.settimeout(20)
            accepted.recv(
                4096
            )  # one that closes with something unread, or before it was sent, turns away whatever it says
            if answer is not None:
                accepted.sendall(answer)
            else:
                done.wait(20)
            accepted.close()

        thread = threading.Thread(target=serve)
        thread.start()
        yield Offer("pool", str(path), "ticket")
        done.set()
        thread.join(20)


def why(offer: Offer, open_s: float = 5.0) -> NoSession:
    with pytest.raises(NotOpened) as caught:
        open_session(offer, LAYOUT, CPU, open_s=open_s)
    return caught.value.why


@pytest.mark.parametrize(
    "path", ["/nowhere/at/all", "", "/", "/etc/hostname", "relative", "\0abstract", "/tmp/" + "x" * 300]
)
def test_what_is_no_socket_here_cannot_be_reached(path: str) -> None:
    assert why(Offer("pool", path, "ticket")) is NoSession.UNREACHABLE


@pytest.mark.parametrize("answer", [b"", b"\xff" * 8, framed(hand_over_pb2.HandOverGivenBack())[:3]])
def test_a_lender_that_says_nothing_of_use_has_turned_us_away(tmp_path: Path, answer: bytes) -> None:
    with listening(tmp_path, answer) as offer:
        assert why(offer) is NoSession.TURNED_AWAY


def test_a_pool_that_is_none_cannot_be_read(tmp_path: Path) -> None:
    with listening(tmp_path, framed(hand_over_pb2.HandOverPool(layout="any", slots=3))) as offer:
        assert why(offer) is NoSession.NOT_READABLE


def test_a_lender_that_says_nothing_is_not_waited_for(tmp_path: Path) -> None:
    with listening(tmp_path, None) as offer:
        assert why(offer, open_s=0.1) is NoSession.NO_ANSWER


def test_a_session_knows_when_it_is_over(tmp_path: Path) -> None:
    with lending(tmp_path) as lender:
        session: Session = open_session(lender.lender.offer("one"), LAYOUT, CPU)
        lent = lender.lend("one", lender.chunk("chunk", 4))
        assert not session.lost
        session.close()
        assert session.lost
        assert session.copy(lent, bits(4, 0), None) is Refusal.PEER_GONE
        assert session.give_back(lent.lease) is Refusal.PEER_GONE
        session.close()


def test_what_is_given_back_twice_is_lost(tmp_path: Path) -> None:
    with lending(tmp_path) as lender:
        session = open_session(lender.lender.offer("one"), LAYOUT, CPU)
        lent: Lent = lender.lend("one", lender.chunk("chunk", 4))
        assert session.give_back(lent.lease) is None
        assert session.give_back(lent.lease) is Refusal.LEASE_LOST
        session.close()
