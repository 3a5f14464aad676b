"""Real services under a real Prometheus: the shipped rules with minutes as seconds, scraped several times a second."""

from __future__ import annotations

import json
import re
import subprocess
import time
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from prometheus_client.parser import text_string_to_metric_families

from cairn import Client
from cairn.local.processes import free_port
from tests.decode_service.models import model_dir
from tests.deploy.exported import scraped
from tests.deploy.test_deploy_files import DEPLOY, read_yaml, tool
from tests.nursery import Child, nursery

DEADLINE_S = 90.0
SCRAPE_S = 0.5
MINUTES = re.compile(r"\b(\d+)m\b")


@dataclass(eq=False)
class Service:
    """One service as a process of its own; its log lines are JSON."""

    name: str
    address: str
    metrics_port: int
    child: Child
    log: Path

    def lines(self) -> list[dict[str, Any]]:
        """Every line so far; one that is not JSON fails the test."""
        *whole, _ = self.log.read_text().split("\n")
        return [json.loads(line) for line in whole]

    def lines_of(self, request_id: str) -> list[str]:
        return [line["message"] for line in self.lines() if line["request_id"] == request_id]

    def wait_for_lines(self, request_id: str, *words: str) -> None:
        """Until each of ``words`` stands in a line of the request."""

        def all_there() -> bool:
            said = self.lines_of(request_id)
            return all(any(word in line for line in said) for word in words)

        wait_until(all_there, f"{self.name}: {words} of {request_id} among {self.lines_of(request_id)}")


class Prometheus:
    """The HTTP API of a running Prometheus."""

    def __init__(self, port: int) -> None:
        self._url = f"http://127.0.0.1:{port}/api/v1"

    def get(self, path: str, **parameters: Any) -> Any:
        with urllib.request.urlopen(f"{self._url}/{path}?{urllib.parse.urlencode(parameters)}", timeout=20) as reply:
            return json.load(reply)["data"]

    def query(self, expression: str) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = self.get("query", query=expression)["result"]
        return found

    def value(self, expression: str) -> float:
        """The one value of an expression; not a number without one."""
        found = self.query(expression)
        assert len(found) <= 1, found
        return float(found[0]["value"][1]) if found else float("nan")

    def wait_for(self, expression: str, value: float) -> None:
        """Until an expression has a value."""
        wait_until(lambda: self.value(expression) == value, f"{expression} is {value}")

    def firing(self) -> dict[str, dict[str, str]]:
        """The labels of the alerts that fire, by name."""
        alerts = self.get("alerts")["alerts"]
        return {alert["labels"]["alertname"]: alert["labels"] for alert in alerts if alert["state"] == "firing"}


@dataclass
class Observed:
    prefill: Service
    decode: Service
    client: Client
    prometheus: Prometheus
    store: Path
    counted_at_start: set[tuple[str, ...]]


@contextmanager
def observed(root: Path) -> Iterator[Observed]:
    """Both services on one store and a Prometheus that scrapes them, all serving; killed at the end."""
    model = model_dir(root / "model")
    shared = ["--model", str(model), "--model-name", "tiny", "--store", f"file://{root / 'store'}"]
    shared += ["--log-format", "json", "--log-level", "debug", "--prefill-tokens-max", "64"]
    with ExitStack() as stack:
        launched = [_launch(stack, root, "prefill", shared)]
        launched.append(_launch(stack, root, "decode", [*shared, "--prefill", launched[0].address]))
        for service in launched:
            _wait_ready(service)
        born = counted(launched)
        prometheus = _prometheus(stack, root, *launched)
        client = stack.enter_context(Client(launched[0].address, launched[1].address, timeout_s=DEADLINE_S))
        yield Observed(launched[0], launched[1], client, prometheus, root / "store", born)


def counted(services: Iterable[Service]) -> set[tuple[str, ...]]:
    """Every series of a counter or a histogram that the services export now: service, name and labels."""
    return {
        (service.name, sample.name, *map("=".join, sorted(sample.labels.items())))
        for service in services
        for family in text_string_to_metric_families(scraped(f"http://127.0.0.1:{service.metrics_port}/metrics"))
        for sample in family.samples
        if family.type in ("counter", "histogram")
    }


def _launch(stack: ExitStack, root: Path, name: str, arguments: list[str]) -> Service:
    port = free_port("127.0.0.1")
    log = root / f"{name}.log"
    stderr = stack.enter_context(log.open("w")).fileno()
    words = ["--port", str(port), *arguments]
    child = nursery().start(f"{name}_service", words, stderr, HF_HUB_OFFLINE="1")
    stack.callback(_end, child)
    return Service(name, f"127.0.0.1:{port}", 0, child, log)


def _wait_ready(service: Service) -> None:
    assert service.child.stdout is not None
    line = service.child.stdout.readline()
    assert line, f"{service.name} did not start: {service.log.read_text()[-3000:]}"
    service.metrics_port = json.loads(line)["metrics_port"]


def _end(child: Child | subprocess.Popen[Any]) -> None:
    child.kill()
    child.wait(20)


def in_seconds(text: str) -> str:
    """A rule's text with its minutes as seconds."""
    return MINUTES.sub(r"\1s", text)


def _prometheus(stack: ExitStack, root: Path, prefill: Service, decode: Service) -> Prometheus:
    jobs = {f"cairn-{service.name}": f"127.0.0.1:{service.metrics_port}" for service in (prefill, decode)}
    shipped = read_yaml(DEPLOY / "prometheus.yml")
    assert {job["job_name"] for job in shipped["scrape_configs"]} == {*jobs, "cairn-gateway"}
    (root / "alerts.yml").write_text(in_seconds((DEPLOY / "alerts.yml").read_text()))
    configuration = {
        "global": {"scrape_interval": f"{SCRAPE_S * 1000:.0f}ms", "evaluation_interval": f"{SCRAPE_S * 1000:.0f}ms"},
        "rule_files": ["alerts.yml"],
        "scrape_configs": [
            {"job_name": job, "static_configs": [{"targets": [target]}]} for job, target in jobs.items()
        ],
    }
    (root / "prometheus.yml").write_text(yaml.safe_dump(configuration))
    port = free_port("127.0.0.1")
    argv = [tool("prometheus"), f"--config.file={root / 'prometheus.yml'}", f"--storage.tsdb.path={root / 'tsdb'}"]
    log = stack.enter_context((root / "prometheus.log").open("w"))
    child = subprocess.Popen([*argv, f"--web.listen-address=127.0.0.1:{port}"], stdout=log, stderr=log)
    stack.callback(_end, child)
    prometheus = Prometheus(port)

    def both_up() -> bool:
        try:
            return prometheus.value("sum(up)") == 2
        except OSError:
            return False

    wait_until(both_up, "Prometheus scrapes both services")
    return prometheus


def wait_until(holds: Callable[[], bool], what: str) -> None:
    """Polls for a condition; fails the test if it does not come about."""
    ends_at = time.monotonic() + DEADLINE_S
    while not holds():
        assert time.monotonic() < ends_at, what
        time.sleep(0.1)
