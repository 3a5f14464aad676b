"""Two prefill and two decode services as processes on one store; each decode service spreads over both prefill ones.

decode 0 ──┬── prefill 0 ──┐
           ╳               ├── one store
decode 1 ──┴── prefill 1 ──┘
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prometheus_client.parser import text_string_to_metric_families

from cairn import Client
from cairn.local.processes import free_port
from tests.models_for_tests import tiny_model_dir

ROOT = Path(__file__).resolve().parents[2]
CALL_S = 90.0
# Many small forwards, so that a document of some thousand tokens takes seconds and can be interrupted.
PIECE_TOKENS = 16
SLOW_MODEL: dict[str, Any] = {"num_hidden_layers": 8, "max_position_embeddings": 8192}


@dataclass
class Service:
    """One service: ``launch`` and ``wait_ready`` start it, ``kill`` is SIGKILL."""

    module: str
    arguments: list[str]
    root: Path
    port: int = 0
    metrics_port: int = 0
    child: subprocess.Popen[str] | None = None
    inside: tuple[str, ...] = ()  # a command that starts it somewhere else, and ends it when it is killed

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    @property
    def log(self) -> Path:
        return self.root / f"{self.module}-{self.port}.log"

    def launch(self) -> None:
        self.port = self.port or free_port("127.0.0.1")
        argv = [*self.inside, sys.executable, "-m", self.module, "--port", str(self.port), *self.arguments]
        environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
        with self.log.open("w") as log:
            self.child = subprocess.Popen(
                argv, stdout=subprocess.PIPE, stderr=log, text=True, cwd=ROOT, env=environment
            )

    def wait_ready(self) -> None:
        assert self.child is not None and self.child.stdout is not None
        line = self.child.stdout.readline()  # the test's own time limit ends a start that hangs
        assert line, f"{self.module} did not start: {self.log.read_text()[-3000:]}"
        self.metrics_port = int(json.loads(line)["metrics_port"])

    def kill(self) -> None:
        assert self.child is not None
        self.child.kill()
        self.child.wait(60)

    def metric(self, name: str, **labels: Any) -> float:
        """The sum of a metric's samples that bear ``labels``."""
        url = f"http://127.0.0.1:{self.metrics_port}/metrics"
        text = urllib.request.urlopen(url, timeout=20).read().decode()
        return sum(
            sample.value
            for family in text_string_to_metric_families(text)
            for sample in family.samples
            if sample.name == name and labels.items() <= sample.labels.items()
        )


@dataclass
class Cluster:
    """The services, and a client of each pair (prefill i, decode i)."""

    prefill: list[Service]
    decode: list[Service]
    clients: list[Client]

    def computed(self) -> list[float]:
        """Tokens that each prefill service has computed since it started."""
        return [service.metric("cairn_prefill_tokens_total", source="computed") for service in self.prefill]


@contextmanager
def cluster(root: Path, store: str, *, each: int = 2, inside: tuple[str, ...] = ()) -> Iterator[Cluster]:
    """``each`` prefill (started ``inside``) and decode services on ``store``, all serving; killed at the end."""
    model = tiny_model_dir(root / "model", **SLOW_MODEL)
    shared = ["--model", str(model), "--model-name", "tiny", "--store", store, "--prefill-tokens-max"]
    shared += [str(PIECE_TOKENS), "--kv-pages", "2048"]
    prefill = [Service("prefill_service", shared, root, inside=inside) for _ in range(each)]
    with ExitStack() as stack:

        def start(services: list[Service]) -> None:
            for service in services:
                service.launch()
                stack.callback(service.kill)

        start(prefill)
        target = "ipv4:" + ",".join(service.address for service in prefill)
        decode = [Service("decode_service", [*shared, "--prefill", target], root) for _ in range(each)]
        start(decode)
        for service in (*prefill, *decode):
            service.wait_ready()
        pairs = zip(prefill, decode, strict=True)
        clients = [stack.enter_context(Client(p.address, d.address, timeout_s=CALL_S)) for p, d in pairs]
        yield Cluster(prefill, decode, clients)


def wait_until(holds: Callable[[], bool], timeout_s: float = 60.0) -> None:
    """Waits for a condition; fails the test if it does not come."""
    ends_at = time.monotonic() + timeout_s
    while not holds():
        assert time.monotonic() < ends_at, "the condition did not come about"
        time.sleep(0.05)
