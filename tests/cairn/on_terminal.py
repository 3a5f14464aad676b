"""A command run with a terminal for its outputs."""

from __future__ import annotations

import os
import pty
import subprocess
import sys


def on_a_terminal(argv: list[str], environment: dict[str, str]) -> bytes:
    """What a command writes when its outputs are a terminal."""
    parent, child = pty.openpty()
    clean = {name: value for name, value in os.environ.items() if name not in ("NO_COLOR", "FORCE_COLOR")}
    process = subprocess.Popen(
        [sys.executable, "-m", "cairn.cli", *argv],
        stdout=child,
        stderr=child,
        stdin=child,
        env={**clean, "TERM": "xterm", **environment},
    )
    os.close(child)
    written = b""
    try:
        while data := os.read(parent, 4096):
            written += data
    except OSError:  # Linux says EIO at the end of a terminal
        pass
    os.close(parent)
    assert process.wait() == 0
    return written
