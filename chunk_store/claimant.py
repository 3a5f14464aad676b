"""Who holds a claim, in a form that lets others tell that the holder is dead.

A claimant is named by boot, process-id namespace, process id and the process's start time. Where all of it can be
compared (Linux, the same boot and namespace), a dead one is known at once; anywhere else only time tells.
"""

from __future__ import annotations

import os
from functools import lru_cache

_SEPARATOR = "/"


def this_claimant() -> str:
    """The name of the calling process; it changes across ``fork``."""
    return _claimant(os.getpid())


def is_dead(claimant: str) -> bool:
    """True only when ``claimant`` certainly runs no more; False for one of another machine or container."""
    fields = claimant.split(_SEPARATOR)
    here = _machine()
    if len(fields) != 4 or not here[0] or tuple(fields[:2]) != here:
        return False
    try:
        return _start_time(int(fields[2])) != fields[3]
    except ValueError:
        return False


@lru_cache(maxsize=1)  # neither changes while a process lives, and each claim asks
def _claimant(pid: int) -> str:
    return _SEPARATOR.join((*_machine(), str(pid), _start_time(pid)))


def _machine() -> tuple[str, str]:
    try:
        with open("/proc/sys/kernel/random/boot_id") as file:
            boot = file.read().strip()
        return boot, os.readlink("/proc/self/ns/pid")
    except OSError:
        return "", ""


def _start_time(pid: int) -> str:
    """Clock ticks after boot when ``pid`` started; "" when there is no such process, or it is a zombie."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            fields = file.read().rpartition(b")")[2].split()
    except OSError:
        return ""
    return "" if fields[0] in (b"Z", b"X") else fields[19].decode()
