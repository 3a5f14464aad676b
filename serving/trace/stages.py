"""How long each stage of a request took: the one list of stages, whose names are those of the message ``StageTimings``.

Both kinds of watch give nanoseconds by stage (``spent_ns``): a ``StageTimer`` adds blocks up, a ``StageClock`` notes
when a request passed what.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Literal, TypeAlias, get_args

Stage: TypeAlias = Literal[
    "queue", "tokenize", "lookup", "prefill", "publish", "load", "forward", "first_token", "decode", "total"
]
STAGES: tuple[Stage, ...] = get_args(Stage)


class StageTimer:
    """Nanoseconds by stage. One request's; the stages may be timed in different threads, one after another."""

    def __init__(self) -> None:
        self._started_ns = time.perf_counter_ns()
        self._spent_ns: dict[Stage, int] = {}

    @contextmanager
    def stage(self, name: Stage) -> Iterator[None]:
        """Adds the time of the block to a stage, also when it raises."""
        started_ns = time.perf_counter_ns()
        try:
            yield
        finally:
            self.add(name, time.perf_counter_ns() - started_ns)

    def add(self, name: Stage, nanoseconds: int) -> None:
        """Adds time that was measured elsewhere. Raises ``ValueError`` for what is no stage."""
        if name not in STAGES:
            raise ValueError(f"stage: {name!r} is none of {', '.join(STAGES)}")
        self._spent_ns[name] = self._spent_ns.get(name, 0) + nanoseconds

    def elapsed_ns(self) -> int:
        """Since the timer was made."""
        return time.perf_counter_ns() - self._started_ns

    def spent_ns(self) -> dict[Stage, int]:
        """By stage so far; ``total`` is the time since the timer was made."""
        return {**self._spent_ns, "total": self.elapsed_ns()}


@dataclass
class StageClock:
    """Monotonic nanoseconds at which a request passed its stages; 0 where it has not.

    ``measured_ns``: of stages that were timed elsewhere.
    """

    arrived: int = field(default_factory=time.monotonic_ns)
    submitted: int = 0
    admitted: int = 0
    filled: int = 0
    first_token: int = 0
    finished: int = 0
    measured_ns: dict[Stage, int] = field(default_factory=dict)

    def spent_ns(self) -> dict[Stage, int]:
        """By stage; 0 for one that the request has not ended."""
        return {
            **self.measured_ns,
            "queue": _between(self.submitted, self.admitted),
            "forward": _between(self.filled, self.first_token or self.finished),
            "first_token": _between(self.arrived, self.first_token),
            "decode": _between(self.first_token, self.finished),
            "total": _between(self.arrived, self.finished),
        }


def _between(began: int, ended: int) -> int:
    return max(0, ended - began) if began else 0
