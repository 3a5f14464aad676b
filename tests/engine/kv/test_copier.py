"""The thread that copies: in order, in no other thread, and no longer than whoever gives it work."""

from __future__ import annotations

import gc
import threading
from functools import partial

from engine.kv.copier import Copier, Copy


def copying() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "cairn-copy"]


def test_copies_are_made_in_order_by_one_thread_and_a_failed_one_says_so() -> None:
    copier, over = Copier("cpu"), threading.Event()
    names: list[tuple[int, str]] = []
    failures: list[BaseException | None] = []

    def failing() -> None:
        raise RuntimeError("no device")

    for number in range(3):
        launch = partial(lambda n: names.append((n, threading.current_thread().name)), number)
        copier.submit(Copy(launch, lambda _: None, None))
    copier.submit(Copy(failing, failures.append, None))
    copier.submit(Copy(lambda: None, lambda _: over.set(), None))
    assert over.wait(60)
    assert names == [(number, "cairn-copy") for number in range(3)]
    assert len(failures) == 1 and isinstance(failures[0], RuntimeError)


def test_its_thread_ends_with_it() -> None:
    gc.collect()
    before = copying()
    copier, over = Copier("cpu"), threading.Event()
    assert copying() == before, "none before there is work"
    copier.submit(Copy(lambda: None, lambda _: over.set(), None))
    assert over.wait(60)
    (thread,) = set(copying()) - set(before)
    del copier
    gc.collect()
    thread.join(60)
    assert not thread.is_alive()
