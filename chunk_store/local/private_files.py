"""Files and directories that nobody but their owner reads: stored KV gives away the prompts it was computed from.

Files are 0600, directories 0700. Made by root below somebody else's directory they belong to that somebody, so that a
repair by an administrator leaves nothing that the services cannot open.
"""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

FILE_MODE = 0o600
DIRECTORY_MODE = 0o700
_OTHERS = 0o077


def make_directory(path: Path) -> None:
    """Creates ``path`` for its owner alone, and its parents as usual; one that is there stays. Raises ``OSError``."""
    if path.is_dir():
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    with suppress(FileExistsError):
        os.mkdir(path, DIRECTORY_MODE)
        _give_to_owner(path)


def create_file(path: Path, flags: int) -> int:
    """``os.open`` of a file that is made for its owner alone. Raises ``OSError``."""
    fd = os.open(path, flags | os.O_CREAT, FILE_MODE)
    try:
        _give_to_owner(path)
    except BaseException:
        os.close(fd)
        raise
    return fd


def close_to_others(path: Path) -> None:
    """Takes away what older software allowed to others, where it is ours to take."""
    with suppress(OSError):
        mode = path.stat().st_mode
        if mode & _OTHERS:
            path.chmod(mode & ~_OTHERS)


def _give_to_owner(path: Path) -> None:
    if os.geteuid() == 0:
        above = path.parent.stat()
        if above.st_uid:
            os.chown(path, above.st_uid, above.st_gid)
