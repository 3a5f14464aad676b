"""What native libraries write straight to descriptor 2, line by line to a function of ours.

For logs that must hold nothing but JSON: gRPC's core and torch's C++ print past Python's logging. A process that is
killed by a signal of its own making (a segmentation fault, an abort) takes its last such line with it; Python's fault
handler writes to the real stderr, as before.
"""

from __future__ import annotations

import atexit
import faulthandler
import os
import sys
import threading
from collections.abc import Callable
from typing import TextIO

FLUSH_S = 1.0
LINE_BYTES_MAX = 8192


def take_native_stderr(tell: Callable[[str], object]) -> TextIO:
    """From now on lines written to descriptor 2, by ``print`` too, go to ``tell``; returns the real stderr."""
    sys.stderr.flush()
    real = os.fdopen(os.dup(2), "w", buffering=1, errors="backslashreplace")
    if faulthandler.is_enabled():
        faulthandler.enable(real)
    source, sink = os.pipe()
    os.dup2(sink, 2)
    os.close(sink)
    thread = threading.Thread(target=_relay, args=(source, tell), name="native-stderr", daemon=True)
    thread.start()
    atexit.register(_give_back, real, thread)
    return real


def _relay(source: int, tell: Callable[[str], object]) -> None:
    with os.fdopen(source, "rb") as lines:
        while line := lines.readline(LINE_BYTES_MAX):
            text = line.decode(errors="replace").strip()
            if text:
                tell(text)


def _give_back(real: TextIO, thread: threading.Thread) -> None:
    """Descriptor 2 is the real stderr again; what is in the pipe is told first."""
    sys.stderr.flush()
    os.dup2(real.fileno(), 2)
    thread.join(FLUSH_S)
