"""The deployment of several services on one Redis: valid, in agreement with itself, closed to other hosts."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from chunk_store.redis_connection import parse_redis_url
from decode_service.options import parse
from tests.deploy.test_deploy_files import read_yaml, run, tool

ROOT = Path(__file__).resolve().parent.parent.parent
FILES = ("-f", "compose.yaml", "-f", "deploy/compose.redis.yaml")


@pytest.fixture(scope="module")
def services() -> dict[str, Any]:
    environment = {**os.environ, "CAIRN_REDIS_PASSWORD": "quartz7"}
    resolved = run(tool("docker-compose"), *FILES, "config", cwd=ROOT, env=environment)
    found: dict[str, Any] = yaml.safe_load(resolved)["services"]
    return found


def flag(command: list[str], name: str) -> str:
    return next(word.split("=", 1)[1] for word in command if word.startswith(f"{name}="))


def test_a_password_must_be_chosen() -> None:
    environment = {name: value for name, value in os.environ.items() if name != "CAIRN_REDIS_PASSWORD"}
    argv = [tool("docker-compose"), *FILES, "config"]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=60, cwd=ROOT, env=environment)
    assert done.returncode != 0 and "choose a password for Redis" in done.stderr


def test_all_services_are_on_one_redis(services: dict[str, Any]) -> None:
    workers = ("prefill", "prefill2", "decode", "decode2")
    (url,) = {flag(services[name]["command"], "--store") for name in workers}
    address = parse_redis_url(url)
    assert (address.host, address.port, address.password) == ("redis", 6379, "quartz7")
    command = services["redis"]["command"]
    assert command[command.index("--requirepass") + 1] == "quartz7"
    assert command[command.index("--appendonly") + 1] == "yes"
    assert command[command.index("--maxmemory-policy") + 1] == "noeviction"


def test_decode_services_reach_both_prefill_services(services: dict[str, Any]) -> None:
    for name in ("decode", "decode2"):
        options = parse(services[name]["command"][3:])
        assert options.prefill == "dns:///prefills:50071"
    for name in ("prefill", "prefill2"):
        assert services[name]["networks"]["default"]["aliases"] == ["prefills"]
        assert flag(services[name]["command"], "--port") == "50071"


def test_nothing_is_published_beyond_this_host_and_redis_not_at_all(services: dict[str, Any]) -> None:
    ports = [str(port) for service in services.values() for port in service.get("ports", [])]
    assert len(ports) >= 4 and all(port.startswith("127.0.0.1:") for port in ports)
    assert len({port.rsplit(":", 1)[0] for port in ports}) == len(ports)
    assert "ports" not in services["redis"]


def test_prometheus_scrapes_all_of_them(services: dict[str, Any]) -> None:
    path = "deploy/prometheus.redis.yml"
    assert "SUCCESS" in run(tool("promtool"), "check", "config", path, cwd=ROOT)
    jobs = read_yaml(ROOT / path)["scrape_configs"]
    assert [job["job_name"] for job in jobs] == ["cairn-prefill", "cairn-decode"]
    targets = {target for job in jobs for static in job["static_configs"] for target in static["targets"]}
    workers = [name for name in services if name.startswith(("prefill", "decode"))]
    assert targets == {f"{name}:{flag(services[name]['command'], '--metrics-port')}" for name in workers}
    mounted = [str(volume) for volume in services["prometheus"]["volumes"]]
    assert sum("prometheus.redis.yml" in volume for volume in mounted) == 1
    assert not any("deploy/prometheus.yml" in volume for volume in mounted)
