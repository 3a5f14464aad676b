"""The prefill service's own settings."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from serving.process.options import ServiceOptions, parse_options
from serving.process.settings import COUNT, DAYS, SECONDS, SIZE, SWITCH, Kind, setting

GROUP = "prefill"
PUBLISHERS_MAX = 12  # a thread writes 2 to 3 GB/s: it takes 8 entries at once to fill a memory file system
STORE_KEEPS = "what the store has; {} when it is new"


@dataclass(frozen=True, kw_only=True)
class PrefillOptions(ServiceOptions):
    """What the prefill service was told to do. None leaves a limit of the store as it is."""

    records_max: int | None = setting(
        COUNT,
        "registered chunks at most, store-wide",
        default=None,
        unset=STORE_KEEPS.format("100000"),
        group=GROUP,
    )
    store_capacity: int | None = setting(
        SIZE, "of stored KV, store-wide", default=None, unset=STORE_KEEPS.format("16GiB"), group=GROUP
    )
    quarantine_days: float | None = setting(
        DAYS, "how long a file:// store keeps bad data", default=None, unset=STORE_KEEPS.format("7"), group=GROUP
    )
    hand_over_lease_s: float = setting(
        SECONDS, "for the decode service to copy what was handed to it", default=10.0, group="hand-over"
    )
    hand_over_dir: Path | None = setting(
        Kind("DIR", Path),
        "where the private directory of the hand-over's socket is made",
        default=None,
        unset="the system's for temporary files",
        group="hand-over",
    )
    jobs_max: int = setting(COUNT, "requests that wait or run at most", default=256, group=GROUP)
    durable: bool = setting(SWITCH, "every reply waits until its KV is stored", default=False, group=GROUP)
    publish_queue: int | None = setting(
        SIZE,
        "of computed KV that waits to be stored; on a card as much memory is pinned",
        default=None,
        unset="8GiB, or an eighth of the memory",
        group=GROUP,
    )
    publish_threads: int | None = setting(
        COUNT, "entries written beside each other", default=None, unset="the processors, at most 12", group=GROUP
    )

    @property
    def publishers(self) -> int:
        """Threads that write entries."""
        return self.publish_threads or min(PUBLISHERS_MAX, len(os.sched_getaffinity(0)))

    @property
    def quarantine_s(self) -> int | None:
        return None if self.quarantine_days is None else round(self.quarantine_days * 86_400)


def parse(words: Sequence[str] | None = None) -> PrefillOptions:
    """The options of this command line, environment and file; ends the program with a message for a bad one."""
    return parse_options(PrefillOptions, "prefill", "Computes chunk KV and publishes it to the chunk store.", words)
