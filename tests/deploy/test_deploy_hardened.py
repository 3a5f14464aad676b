"""Every compose file: containers confined, images pinned, no password that nobody chose; the file for a GPU."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from decode_service import options as decode_options
from prefill_service import options as prefill_options
from tests.deploy.test_deploy_files import read_yaml, run, tool

ROOT = Path(__file__).resolve().parent.parent.parent
PROFILES = ("alerts", "dashboard")
DEPLOYMENTS = {
    "one host": ("compose.yaml",),
    "redis": ("compose.yaml", "deploy/compose.redis.yaml"),
    "gpu": ("compose.yaml", "deploy/compose.gpu.yaml"),
}
VERSION = re.compile(r"^[a-z/]+(:v?\d+\.\d+\.\d+[a-z0-9.-]*|@sha256:[0-9a-f]{64})$")


def resolved(name: str) -> dict[str, Any]:
    files = [word for file in DEPLOYMENTS[name] for word in ("-f", file)]
    environment = {**os.environ, "COMPOSE_PROFILES": ",".join(PROFILES)}
    found: dict[str, Any] = yaml.safe_load(run(tool("docker-compose"), *files, "config", cwd=ROOT, env=environment))
    return found


@pytest.fixture(scope="module", params=DEPLOYMENTS)
def services(request: pytest.FixtureRequest) -> dict[str, Any]:
    found: dict[str, Any] = resolved(request.param)["services"]
    return found


def test_every_container_is_confined(services: dict[str, Any]) -> None:
    assert {"prefill", "decode", "prometheus", "alertmanager", "grafana"} <= set(services)
    for name, service in services.items():
        assert service["read_only"] is True, name
        assert service["cap_drop"] == ["ALL"] and "cap_add" not in service, name
        assert service["security_opt"] == ["no-new-privileges"], name
        assert service["mem_limit"], name
        assert not service.get("privileged") and service.get("network_mode") is None, name


def test_every_image_is_ours_or_has_a_version(services: dict[str, Any]) -> None:
    for name, service in services.items():
        assert service["image"] in ("cairn", "cairn-gpu") or VERSION.match(service["image"]), name
    (base,) = re.findall(r"^FROM (.*)$", (ROOT / "Dockerfile").read_text(), re.MULTILINE)
    assert base == "python:${PYTHON}-slim"
    assert re.search(r"^ARG PYTHON=3\.\d+$", (ROOT / "Dockerfile").read_text(), re.MULTILINE)


def test_models_are_kept_in_a_volume(services: dict[str, Any]) -> None:
    (home,) = re.findall(r"HF_HOME=(\S+)", (ROOT / "Dockerfile").read_text())
    for name, service in services.items():
        if name.startswith(("prefill", "decode")):
            places = [str(v["target"] if isinstance(v, dict) else v.split(":")[1]) for v in service["volumes"]]
            assert any(Path(home).is_relative_to(place) for place in places), name


@pytest.mark.parametrize("content", [None, ""])
def test_grafana_refuses_to_start_without_a_password(tmp_path: Path, content: str | None) -> None:
    grafana = read_yaml(ROOT / "compose.yaml")["services"]["grafana"]
    assert not any("PASSWORD" in key and not key.endswith("__FILE") for key in grafana["environment"])
    assert "GF_AUTH_ANONYMOUS_ENABLED" not in grafana["environment"]
    password = tmp_path / "grafana_password"
    if content is not None:
        password.write_text(content)
    script = grafana["entrypoint"][-1].replace("$$", "$").replace("/run/secrets/grafana_password", str(password))
    script = script.replace("/run.sh", "echo started")
    done = subprocess.run(["sh", "-c", script], capture_output=True, text=True, timeout=60)
    assert done.returncode == 1 and "grafana_password: no password" in done.stderr and not done.stdout
    password.write_text("quartz7\n")
    assert subprocess.run(["sh", "-c", script], capture_output=True, text=True, timeout=60).stdout == "started\n"


def test_alerts_reach_alertmanager() -> None:
    assert "SUCCESS" in run(tool("amtool"), "check-config", str(ROOT / "deploy" / "alertmanager.yml"))
    severities = {
        rule["labels"]["severity"]
        for group in read_yaml(ROOT / "deploy/alerts.yml")["groups"]
        for rule in group["rules"]
    }
    routes = run(
        tool("amtool"), "config", "routes", "test", f"--config.file={ROOT / 'deploy/alertmanager.yml'}", "severity=page"
    )
    assert routes.strip() == "team" and "page" in severities
    for file in ("prometheus.yml", "prometheus.redis.yml"):
        (manager,) = read_yaml(ROOT / "deploy" / file)["alerting"]["alertmanagers"]
        assert manager["static_configs"] == [{"targets": ["alertmanager:9093"]}]


def test_the_gpu_file_reserves_one_device_for_both_and_keeps_kv_in_memory() -> None:
    project = resolved("gpu")
    for name, parse in (("prefill", prefill_options.parse), ("decode", decode_options.parse)):
        service = project["services"][name]
        (device,) = service["deploy"]["resources"]["reservations"]["devices"]
        assert device == {"driver": "nvidia", "device_ids": ["0"], "capabilities": ["gpu"]}
        shared = parse(service["command"][3:])
        assert (shared.device, shared.host, shared.store) == ("cuda", "0.0.0.0", "file:///var/lib/cairn")
        volumes = [str(v["source"] if isinstance(v, dict) else v.split(":")[0]) for v in service["volumes"]]
        assert sorted(volumes) == ["cache", "memory"]
        assert service["image"] == "cairn-gpu" and service["shm_size"]
    assert project["volumes"]["memory"]["driver_opts"]["type"] == "tmpfs"
    names = set(re.findall(r"^ARG (\w+)", (ROOT / "Dockerfile").read_text(), re.MULTILINE))
    assert set(read_yaml(ROOT / "deploy/compose.gpu.yaml")["services"]["prefill"]["build"]["args"]) <= names
