"""Services that tests start again and again, forked from a process that has imported torch and transformers once.

Each is a process of its own that runs its module as ``python -m`` does, with pipes, signals and an exit status, four
seconds of a core sooner. That the commands start from nothing is seen where tests run these themselves
(tests/cairn/test_end_to_end.py, tests/prefill_service/test_prefill_process.py).
"""

from __future__ import annotations

import array
import atexit
import functools
import importlib
import json
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import IO

ROOT = Path(__file__).resolve().parent.parent
LONGEST = 1 << 16
PRELOADED = (
    "cairn.local.together.assembly",
    "decode_service.kv_source.prefill_client",
    "serving.process.life",
    "transformers.models.qwen3.modeling_qwen3",
)


class Child:
    """A process of the nursery, with what tests use of ``subprocess.Popen``."""

    def __init__(self, pid: int, stdout: IO[str], status: int) -> None:
        """``status`` is the reading end of a pipe that gives the exit status."""
        self.pid = pid
        self.stdout = stdout
        self.returncode: int | None = None
        self._status = status

    def poll(self) -> int | None:
        return self._read(0)

    def wait(self, timeout: float) -> int:
        """Raises ``subprocess.TimeoutExpired``."""
        code = self._read(timeout)
        if code is None:
            raise subprocess.TimeoutExpired(f"process {self.pid}", timeout)
        return code

    def _read(self, timeout: float) -> int | None:
        if self.returncode is None and select.select([self._status], [], [], timeout)[0]:
            self.returncode = int(os.read(self._status, 64) or b"-9")
            os.close(self._status)
        return self.returncode

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)


class Nursery:
    """The process that forks, and the socket it is asked over."""

    def __init__(self) -> None:
        self._socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        argv = [sys.executable, "-m", "tests.nursery", str(theirs.fileno())]
        self._process = subprocess.Popen(argv, pass_fds=[theirs.fileno()], cwd=ROOT)
        theirs.close()
        atexit.register(self.end)

    def start(self, module: str, arguments: Sequence[str], stderr: int = 2, **environment: str) -> Child:
        """``python -m module arguments`` in the repository, with this process's environment and ``environment``.

        ``stderr`` is a file descriptor.
        """
        out, theirs_out = os.pipe()
        status, theirs_status = os.pipe()
        asked = json.dumps([module, list(arguments), {**os.environ, **environment}]).encode()
        fds = array.array("i", [theirs_out, stderr, theirs_status])
        self._socket.sendmsg([asked], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, fds)])
        os.close(theirs_out)
        os.close(theirs_status)
        pid = int(self._socket.recv(64))
        return Child(pid, os.fdopen(out, encoding="utf-8"), status)

    def end(self) -> None:
        """The nursery ends; what it forked is its tests' to end."""
        self._socket.close()
        self._process.wait(60)


@functools.cache
def nursery() -> Nursery:
    """The nursery of this process, which begins to import when it is first asked for."""
    return Nursery()


def main(asked: socket.socket) -> None:
    """Forks for each message until the other side is closed; returns in a child that has run its module."""
    for name in PRELOADED:
        importlib.import_module(name)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody asks for the status of those who wait for a service
    while True:
        message, fds, _, _ = socket.recv_fds(asked, LONGEST, 3)
        if not message:
            return
        out, err, status = fds
        if os.fork() == 0:
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            _forked(asked, json.loads(message), out, err, status)
            return
        for fd in fds:
            os.close(fd)


def _forked(asked: socket.socket, what: tuple[str, list[str], dict[str, str]], out: int, err: int, status: int) -> None:
    """The service in a process of its own, and here one that waits for it and tells how it ended."""
    pid = os.fork()
    if pid:
        asked.send(str(pid).encode())
        for fd in (out, err, asked.fileno()):
            os.close(fd)
        _, ended = os.waitpid(pid, 0)
        os.write(status, str(os.waitstatus_to_exitcode(ended)).encode())
        os._exit(0)
    os.close(status)
    asked.close()
    os.dup2(out, 1)
    os.dup2(err, 2)
    os.close(out)
    os.close(err)
    module, arguments, environment = what
    os.environ.clear()
    os.environ.update(environment)
    time.tzset()
    sys.argv = [module, *arguments]
    runpy.run_module(module, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main(socket.socket(fileno=int(sys.argv[1])))
