"""How long each stage of a request took, under the names of the data-flow line (those of ``StageTimings``)."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

STAGES = ("queue", "tokenize", "lookup", "prefill", "publish", "load", "forward", "first_token", "decode", "total")


class StageTimer:
    """Nanoseconds by stage. One request's; the stages may be timed in different threads, one after another."""

    def __init__(self) -> None:
        self._started_ns = time.perf_counter_ns()
        self._spent_ns: dict[str, int] = {}

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Adds the time of the block to stage ``name``, one of ``STAGES``, also when it raises."""
        if name not in STAGES:
            raise ValueError(f"stage: {name!r} is none of {', '.join(STAGES)}")
        started_ns = time.perf_counter_ns()
        try:
            yield
        finally:
            self.add(name, time.perf_counter_ns() - started_ns)

    def add(self, name: str, nanoseconds: int) -> None:
        """Adds time that was measured elsewhere."""
        self._spent_ns[name] = self._spent_ns.get(name, 0) + nanoseconds

    def elapsed_ns(self) -> int:
        """Since the timer was made."""
        return time.perf_counter_ns() - self._started_ns

    def spent_ns(self) -> dict[str, int]:
        """Nanoseconds by stage so far; ``total`` is the time since the timer was made."""
        return {**self._spent_ns, "total": self.elapsed_ns()}
