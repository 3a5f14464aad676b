"""The deployment of several services on one Redis: valid, in agreement with itself, closed to other hosts."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import redis
import yaml
from redis.backoff import ConstantBackoff
from redis.retry import Retry

from chunk_store.redis.connection import parse_redis_url
from decode_service.options import parse
from gateway.options import parse as parse_gateway
from tests.deploy.test_deploy_files import read_yaml, run, tool

ROOT = Path(__file__).resolve().parent.parent.parent
FILES = ("-f", "compose.yaml", "-f", "deploy/compose.redis.yaml")


@pytest.fixture(scope="module")
def services() -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load(run(tool("docker-compose"), *FILES, "config", cwd=ROOT))["services"]
    return found


def flag(command: list[str], name: str) -> str:
    return next(word.split("=", 1)[1] for word in command if word.startswith(f"{name}="))


def test_all_services_are_on_one_redis(services: dict[str, Any], tmp_path: Path) -> None:
    workers = ("prefill", "prefill2", "decode", "decode2")
    (url,) = {flag(services[name]["command"], "--store") for name in workers}
    password = tmp_path / "redis_password"
    password.write_text("quartz7\n")
    address = parse_redis_url(url.replace("/run/secrets/redis_password", str(password)))
    assert (address.host, address.port, address.password) == ("redis", 6379, "quartz7")
    script = services["redis"]["entrypoint"][-1]
    assert "--appendonly yes" in script and "--maxmemory-policy noeviction" in script


def test_secrets_are_files_which_every_service_that_names_them_gets(services: dict[str, Any]) -> None:
    for name in ("redis", "prefill", "prefill2", "decode", "decode2"):
        service = services[name]
        given = {str(secret["source"] if isinstance(secret, dict) else secret) for secret in service.get("secrets", [])}
        assert set(re.findall(r"/run/secrets/(\w+)", str(service))) == given, name
    for name in ("prefill", "prefill2", "decode", "decode2"):
        assert flag(services[name]["command"], "--token-file") == "/run/secrets/tokens"
    top = yaml.safe_load(run(tool("docker-compose"), *FILES, "config", cwd=ROOT))["secrets"]
    assert {"redis_password", "tokens"} <= set(top)
    assert all(Path(secret["file"]).parent.name == "secrets" for secret in top.values())


@pytest.mark.parametrize("password", ["", "plain", 'qu"ar\\tz 7 $HOME'])
def test_redis_takes_any_password_and_refuses_none(services: dict[str, Any], tmp_path: Path, password: str) -> None:
    """Its entrypoint, with Redis itself: on a socket of the test's own and without a port."""
    secret, configuration = tmp_path / "redis_password", tmp_path / "redis.conf"
    secret.write_text(f"{password}\n")
    script = services["redis"]["entrypoint"][-1].replace("$$", "$").replace("/run/secrets/redis_password", str(secret))
    script = script.replace("/tmp/redis.conf", str(configuration)).replace("/data", str(tmp_path))
    socket = tmp_path / "redis.sock"
    argv = ["sh", "-c", f"{script.rstrip()} --port 0 --unixsocket {socket}"]
    with subprocess.Popen(argv, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as server:
        try:
            if not password:
                assert server.wait(30) != 0 and server.stderr is not None
                assert "secrets/redis_password: no password" in server.stderr.read()
                return
            assert redis.Redis(
                unix_socket_path=str(socket), password=password, retry=Retry(ConstantBackoff(0.1), 100)
            ).ping()
            with pytest.raises(redis.exceptions.AuthenticationError):
                redis.Redis(unix_socket_path=str(socket), password="another").ping()
        finally:
            server.kill()


def test_decode_services_reach_both_prefill_services(services: dict[str, Any], tmp_path: Path) -> None:
    for name in ("tokens", "redis_password"):
        (tmp_path / name).write_text("quartz7\n")
    for name in ("decode", "decode2"):
        options = parse([word.replace("/run/secrets", str(tmp_path)) for word in services[name]["command"][3:]])
        assert options.prefill == "dns:///prefills:50071"
    for name in ("prefill", "prefill2"):
        assert services[name]["networks"]["default"]["aliases"] == ["prefills"]
        assert flag(services[name]["command"], "--port") == "50071"


def test_the_gateway_asks_all_of_them(services: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "tokens").write_text("quartz7\n")
    words = services["gateway"]["command"][3:]
    options = parse_gateway([word.replace("/run/secrets", str(tmp_path)) for word in words])
    assert options.decode.split(",") == ["decode:50072", "decode2:50072"] and options.prefill == "dns:///prefills:50071"
    assert options.token_file is not None and options.http_port == 8000
    assert set(re.findall(r"/run/secrets/(\w+)", str(words))) == {"tokens"}


def test_nothing_is_published_beyond_this_host_and_redis_not_at_all(services: dict[str, Any]) -> None:
    ports = [str(port) for service in services.values() for port in service.get("ports", [])]
    assert len(ports) >= 4 and all(port.startswith("127.0.0.1:") for port in ports)
    assert len({port.rsplit(":", 1)[0] for port in ports}) == len(ports)
    assert "ports" not in services["redis"]


def test_prometheus_scrapes_all_of_them(services: dict[str, Any]) -> None:
    path = "deploy/prometheus.redis.yml"
    assert "SUCCESS" in run(tool("promtool"), "check", "config", path, cwd=ROOT)
    jobs = read_yaml(ROOT / path)["scrape_configs"]
    assert [job["job_name"] for job in jobs] == ["cairn-prefill", "cairn-decode", "cairn-gateway"]
    targets = {target for job in jobs for static in job["static_configs"] for target in static["targets"]}
    workers = [name for name in services if name.startswith(("prefill", "decode", "gateway"))]
    assert targets == {f"{name}:{flag(services[name]['command'], '--metrics-port')}" for name in workers}
    mounted = [str(volume) for volume in services["prometheus"]["volumes"]]
    assert sum("prometheus.redis.yml" in volume for volume in mounted) == 1
    assert not any("deploy/prometheus.yml" in volume for volume in mounted)
