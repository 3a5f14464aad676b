"""What a service does before it serves: a line for each stage as it begins, with the seconds since the start."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from chunk_store.quantities import human_bytes

log = logging.getLogger(__name__)

WEIGHT_FILES = ("*.safetensors", "*.bin")


class Startup:
    """The stages of one start and how long each took, in seconds, rounded to milliseconds."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def stage(self, name: str, words: str) -> Iterator[None]:
        """Says ``words`` and adds the block's time to stage ``name``."""
        say(words)
        began = time.perf_counter()
        try:
            yield
        finally:
            spent = self.seconds.get(name, 0.0) + time.perf_counter() - began
            self.seconds[name] = round(spent, 3)


def say(words: str) -> None:
    log.info("%.1f s: %s", seconds_since_start(), words)


def seconds_since_start() -> float:
    """Since this process imported ``logging``, which is among the first things it does."""
    return logging.makeLogRecord({}).relativeCreated / 1000


def weights_on_disk(model: str) -> str:
    """The size of a model directory's weight files, for people; "" for a hub id."""
    path = Path(model)
    for pattern in WEIGHT_FILES:
        total = sum(file.stat().st_size for file in path.glob(pattern))
        if total:
            return human_bytes(total)
    return ""
