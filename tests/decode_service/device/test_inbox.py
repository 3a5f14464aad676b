"""The inbox of the device thread: the order of what comes, and its end."""

from __future__ import annotations

import threading

import pytest

from decode_service.device.inbox import Inbox
from serving.errors import Unavailable


def test_what_comes_is_run_in_order_with_what_it_brings() -> None:
    inbox, ran = Inbox(), list[int]()
    inbox.put(lambda: ran.append(1))
    inbox.call(lambda: inbox.put(lambda: ran.append(3)))
    inbox.put(lambda: ran.append(2))
    inbox.run(idle=False)
    assert ran == [1, 2, 3]
    inbox.run(idle=False)
    assert ran == [1, 2, 3]


def test_who_is_idle_waits_for_the_first_and_for_no_second() -> None:
    inbox, ran = Inbox(), list[int]()
    comes = threading.Timer(0.05, lambda: inbox.put(lambda: ran.append(1)))
    comes.start()
    for _ in range(100):
        if ran:
            break
        inbox.run(idle=True)
    comes.join()
    assert ran == [1]


def test_what_was_called_before_the_end_is_run_and_nothing_afterwards() -> None:
    inbox, ran = Inbox(), list[int]()

    def breaks() -> None:
        raise RuntimeError("a last call")

    inbox.call(breaks)
    inbox.call(lambda: ran.append(1))
    inbox.close("the service is shutting down")
    assert ran == [1], "one that fails holds up no other"
    with pytest.raises(Unavailable, match="shutting down"):
        inbox.call(lambda: ran.append(2))
    inbox.put(lambda: ran.append(3))
    assert ran == [1]


def test_an_error_is_its_thread_s_as_long_as_it_runs() -> None:
    inbox = Inbox()

    def breaks() -> None:
        raise MemoryError

    inbox.put(breaks)
    with pytest.raises(MemoryError):
        inbox.run(idle=False)
