"""Child processes that start in milliseconds and are ended by their own handle, never by a name."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerProcess
from typing import Any

CONTEXT = multiprocessing.get_context("forkserver")  # children never inherit an open SQLite connection
CONTEXT.set_forkserver_preload(["chunk_store.open", "tests.chunk_store.contract", "tests.chunk_store.workers"])


@dataclass
class Child:
    process: ForkServerProcess
    reports: Connection
    gone: bool = False

    def kill(self) -> list[bytes]:
        """kill -9; returns what the child reported before."""
        self.process.kill()
        self.process.join(10)
        return self.drain()

    def wait_for_report(self) -> None:
        """Returns when a report can be read."""
        assert self.reports.poll(60), "the child reported nothing"

    def drain(self) -> list[bytes]:
        """What was reported and not read yet."""
        found = []
        try:
            while self.reports.poll():
                found.append(self.reports.recv_bytes())
        except (EOFError, OSError):
            self.gone = True  # a report cut by the kill ends the list
        return found


@contextmanager
def child(target: Callable[..., None], *args: Any, ready: bool = True) -> Iterator[Child]:
    """Runs ``target(*args, reports)``; killed at the latest when the block ends."""
    receiver, sender = CONTEXT.Pipe(duplex=False)
    process = CONTEXT.Process(target=target, args=(*args, sender), daemon=True)
    process.start()
    sender.close()
    started = Child(process, receiver)
    try:
        if ready:
            assert receiver.poll(30), "the child did not start"
            assert receiver.recv_bytes() == b"ready"
        yield started
    finally:
        process.kill()
        process.join(10)
        receiver.close()
