"""What the load generator and its processes say to each other, and the number that they share."""

from __future__ import annotations

import fcntl
import os
import tempfile
from dataclasses import dataclass

from cairn.load.answer import Answer
from cairn.load.target import Known

READY, STOP = "ready", "stop"  # a job, READY, the time to begin, Progress now and then, STOP perhaps, a Result
REPORT_S = 0.5


@dataclass(frozen=True)
class Result:
    """What one process saw."""

    answers: list[Answer]
    ended: float
    busy: float
    known: Known


class Counter:
    """A number that several processes count up."""

    def __init__(self, fd: int) -> None:
        self.fd = fd

    @classmethod
    def new(cls) -> Counter:
        """One that child processes can be given."""
        with tempfile.TemporaryFile() as file:
            return cls(os.dup(file.fileno()))

    def set(self, value: int) -> None:
        os.pwrite(self.fd, value.to_bytes(8), 0)

    def next(self) -> int:
        """The number, for this process alone."""
        fcntl.lockf(self.fd, fcntl.LOCK_EX)
        try:
            value = int.from_bytes(os.pread(self.fd, 8, 0))
            self.set(value + 1)
        finally:
            fcntl.lockf(self.fd, fcntl.LOCK_UN)
        return value

    def close(self) -> None:
        os.close(self.fd)
