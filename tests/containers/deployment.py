"""Compose projects on a real container engine: brought up, asked, inspected, and taken down with their volumes."""

from __future__ import annotations

import http.client
import json
import os
import shutil
import socket
import subprocess
import time
import urllib.request
from collections.abc import Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlsplit

from cairn.local.processes import free_port

ROOT = Path(__file__).resolve().parent.parent.parent
PORTS = ("CAIRN_PREFILL_PORT", "CAIRN_DECODE_PORT", "CAIRN_DECODE2_PORT", "CAIRN_PROMETHEUS_PORT")
START_S = 900.0
POLL_S = 0.5


class Engine:
    """The engine at ``DOCKER_HOST``, else Docker's usual socket."""

    def __init__(self) -> None:
        self.host = os.environ.get("DOCKER_HOST") or "unix:///var/run/docker.sock"

    def absence(self) -> str:
        """Why nothing can be run with it; "" if it answers."""
        if not compose_command():
            return "neither docker-compose nor docker compose is installed"
        try:
            status, _ = self.get("/_ping")
        except (OSError, http.client.HTTPException) as error:
            return f"no container engine answers at {self.host} ({error})"
        return "" if status == 200 else f"the container engine at {self.host} answers {status}"

    def get(self, path: str) -> tuple[int, Any]:
        """Status and JSON of a question to the engine's API. Raises ``OSError``."""
        place = urlsplit(self.host)
        connection = http.client.HTTPConnection(place.hostname or "localhost", place.port, timeout=30)
        if place.scheme == "unix":
            connection.sock = socket.socket(socket.AF_UNIX)
            connection.sock.settimeout(30)
            connection.sock.connect(place.path)
        with closing(connection):
            connection.request("GET", path)
            reply = connection.getresponse()
            body = reply.read()
        return reply.status, json.loads(body) if body[:1] in (b"{", b"[") else body

    def image(self, name: str) -> dict[str, Any] | None:
        """What the engine knows of an image, None if it does not have it."""
        status, found = self.get(f"/images/{quote(name, safe='')}/json")
        return found if status == 200 else None


class Deployment:
    """One compose project with a name, ports and volumes of its own."""

    def __init__(
        self, engine: Engine, files: Sequence[str | Path], environment: Mapping[str, str] | None = None
    ) -> None:
        self.engine = engine
        self.project = f"cairn-test-{os.getpid()}-{time.monotonic_ns() % 10**6}"
        self.ports = {name: free_port("127.0.0.1") for name in PORTS}
        ports = {name: str(port) for name, port in self.ports.items()}
        self.environment = {**os.environ, **ports, **(environment or {})}
        self.files = [word for file in files for word in ("-f", str(file))]

    def compose(self, *argv: str, timeout_s: float = START_S) -> str:
        """What ``docker-compose`` prints. Fails with everything it said if it does not end with 0."""
        done = self.attempt(*argv, timeout_s=timeout_s)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def attempt(self, *argv: str, timeout_s: float = START_S) -> subprocess.CompletedProcess[str]:
        command = [*compose_command(), "-p", self.project, "--project-directory", str(ROOT), *self.files, *argv]
        return subprocess.run(
            command, capture_output=True, text=True, timeout=timeout_s, cwd=ROOT, env=self.environment, check=False
        )

    def up(self, *services: str) -> None:
        """Starts them and waits until those that have a health check are healthy."""
        self.compose("up", "-d", "--no-build", *services)
        for service in services:
            self.wait_healthy(service)

    def wait_healthy(self, service: str) -> None:
        ends_at = time.monotonic() + START_S
        while True:
            state = self.inspect(service)["State"]
            health = (state.get("Health") or state.get("Healthcheck") or {}).get("Status") or "none"
            if state["Running"] and health in ("healthy", "none"):
                return
            assert time.monotonic() < ends_at, f"{service} is {health}: {self.logs(service)}"
            time.sleep(POLL_S)

    def inspect(self, service: str) -> dict[str, Any]:
        """The engine's account of a service's container."""
        container = self.compose("ps", "-q", service).strip()
        status, found = self.engine.get(f"/containers/{container}/json")
        assert status == 200, found
        return dict(found)

    def execute(self, service: str, *argv: str) -> str:
        return self.compose("exec", "-T", service, *argv).strip()

    def logs(self, service: str) -> str:
        done = self.attempt("logs", "--tail=40", service)
        return done.stdout + done.stderr

    def address(self, port: str) -> str:
        return f"127.0.0.1:{self.ports[port]}"

    def targets(self) -> dict[str, str]:
        """Health of every target that Prometheus scrapes, by its address."""
        url = f"http://{self.address('CAIRN_PROMETHEUS_PORT')}/api/v1/targets?state=active"
        try:
            with urllib.request.urlopen(url, timeout=10) as reply:
                active = json.load(reply)["data"]["activeTargets"]
        except OSError:
            return {}
        return {target["labels"]["instance"]: target["health"] for target in active}

    def wait_targets(self, expected: set[str]) -> None:
        """Until Prometheus has scraped exactly these with success."""
        ends_at = time.monotonic() + 60.0
        while (found := self.targets()) != dict.fromkeys(expected, "up"):
            assert time.monotonic() < ends_at, found
            time.sleep(POLL_S)

    def down(self) -> None:
        self.compose("down", "--volumes", "--remove-orphans", "--timeout", "30")


def compose_command() -> list[str]:
    """``docker-compose``, else ``docker compose``; empty if there is neither."""
    if shutil.which("docker-compose"):
        return ["docker-compose"]
    if shutil.which("docker") and not subprocess.run(["docker", "compose", "version"], capture_output=True).returncode:
        return ["docker", "compose"]
    return []
