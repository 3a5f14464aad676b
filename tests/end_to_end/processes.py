"""The two services as processes of their own, that can be killed and started again at the same address."""

from __future__ import annotations

import json
import signal
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cairn.local.processes import free_port
from tests.nursery import Child, nursery

ROOT = Path(__file__).resolve().parent.parent.parent


@dataclass
class Process:
    """One service: ``start`` waits until it is ready, ``kill`` is SIGKILL."""

    module: str
    arguments: list[str]
    port: int
    child: Child | None = None
    metrics_port: int = 0
    said: Any = None  # its log: what it wrote to stderr
    ready: Any = None  # its ready line

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    def launch(self) -> None:
        self.said = tempfile.TemporaryFile("w+")  # noqa: SIM115  # as long as the process
        self.child = nursery().start(self.module, ["--port", str(self.port), *self.arguments], self.said.fileno())

    def wait_ready(self) -> None:
        line = self.child.stdout.readline()
        if not line:
            self.said.seek(0)
            raise AssertionError(f"{self.module} did not start:\n{self.said.read()[-4000:]}")
        self.ready = json.loads(line)
        self.metrics_port = self.ready["metrics_port"]

    def kill(self) -> None:
        self.child.kill()
        self.child.wait(60)

    def revive(self) -> None:
        """Starts it again if an earlier test left it dead."""
        if self.child.poll() is not None:
            self.launch()
            self.wait_ready()

    def pause(self) -> None:
        self.child.send_signal(signal.SIGSTOP)

    def resume(self) -> None:
        self.child.send_signal(signal.SIGCONT)

    def end(self) -> int:
        """Asks it to end and returns its exit code."""
        self.child.terminate()
        return self.child.wait(30)


@contextmanager
def processes(model: Path, store: Path) -> Iterator[tuple[Process, Process]]:
    """A prefill and a decode service, ready; whatever is left of them is killed at the end."""
    with replicas(model, store, 1) as (prefill, decode):
        yield prefill, decode


@contextmanager
def replicas(model: Path, store: Path, decodes: int, *options: str) -> Iterator[tuple[Process, ...]]:
    """A prefill service and several decode services with these ``options``, ready; killed at the end."""
    shared = [
        "--model",
        str(model),
        "--store",
        f"file://{store}",
        "--log-level",
        "warning",
        "--prefill-tokens-max",
        "8",
    ]
    prefill = Process("prefill_service", shared, free_port("127.0.0.1"))
    own = [*shared, "--prefill", prefill.address, *options]
    everyone = (prefill, *(Process("decode_service", own, free_port("127.0.0.1")) for _ in range(decodes)))
    try:
        for process in everyone:
            process.launch()
        for process in everyone:
            process.wait_ready()
        yield everyone
    finally:
        for process in everyone:
            if process.child is not None and process.child.poll() is None:
                process.kill()
