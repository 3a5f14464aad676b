"""The deployment's files are valid, agree with each other, and name only metrics and flags that exist."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from gateway.options import parse
from tests.deploy.exported import documented, samples_of

ROOT = Path(__file__).resolve().parent.parent.parent
DEPLOY = ROOT / "deploy"
METRIC = re.compile(r"\b((?:cairn|process)_[a-z0-9_]+)\b(?:\{([^}]*)\})?")
MATCHER = re.compile(r"([a-z_]+)\s*[=!]~?")
EXPORTED = samples_of(documented())
NOT_SHOWN = {  # alerts use them, or another series says the same
    *("prefill_seconds", "prefill_queue_depth", "prefill_misses_total", "rpc_seconds", "rpcs_running"),
    *("prompt_tokens_total", "kv_cache_usage_perc", "store_up", "store_chunks", "store_chunks_max"),
    *("decode_steps_total", "request_failure_total"),
}
GROUPING = re.compile(r"\bby\s*\(([^)]*)\)")


def tool(name: str) -> str:
    path = shutil.which(name)
    if path is None:
        pytest.skip(f"{name} is not installed")
    return path


def run(*argv: str, **options) -> str:
    done = subprocess.run(argv, capture_output=True, text=True, timeout=60, **options)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def read_yaml(path: Path):
    return yaml.safe_load(path.read_text())


@pytest.fixture(scope="module")
def compose():
    return read_yaml(ROOT / "compose.yaml")


def test_compose_is_valid():
    resolved = yaml.safe_load(run(tool("docker-compose"), "-f", "compose.yaml", "config", cwd=ROOT))
    assert {"prefill", "decode", "prometheus"} <= set(resolved["services"])
    assert "--model=/opt/cairn/models/fable" in resolved["services"]["decode"]["command"]


def test_compose_shares_one_store(compose):
    services = compose["services"]
    for name in ("prefill", "decode"):
        assert "store:/var/lib/cairn" in services[name]["volumes"]
        assert "--store=file:///var/lib/cairn" in services[name]["command"]
    assert "store" in compose["volumes"]
    assert "version" not in compose


def test_nothing_is_published_beyond_this_host(compose):
    ports = [port for service in compose["services"].values() for port in service.get("ports", [])]
    assert len(ports) == 6
    assert all(str(port).startswith("127.0.0.1:") for port in ports)


def test_the_files_that_compose_mounts_exist(compose):
    mounted = [
        volume.split(":")[0]
        for service in compose["services"].values()
        for volume in service["volumes"]
        if str(volume).startswith("./")
    ]
    assert len(mounted) == 5
    assert all((ROOT / path).exists() for path in mounted)


def test_health_checks_ask_the_port_that_is_served(compose):
    for name in ("prefill", "decode"):
        service = compose["services"][name]
        port = next(flag.split("=")[1] for flag in service["command"] if flag.startswith("--port="))
        assert service["healthcheck"]["test"] == ["CMD", "cairn", "health", f"127.0.0.1:{port}"]


def test_the_gateway_is_told_what_it_knows(compose):
    command = compose["services"]["gateway"]["command"]
    options = parse(command[3:])
    assert command[:3] == ["python", "-m", "gateway"]
    assert (options.prefill, options.decode, options.http_port) == ("prefill:50071", "decode:50072", 8000)
    assert f":{options.http_port}/health" in compose["services"]["gateway"]["healthcheck"]["test"][-1]
    assert compose["services"]["gateway"]["ports"] == ["127.0.0.1:${CAIRN_HTTP_PORT:-8000}:8000"]


def test_the_image_gets_what_it_copies():
    copied = [
        word
        for line in (ROOT / "Dockerfile").read_text().splitlines()
        if line.startswith("COPY ")
        for word in line.split()[1:-1]
    ]
    ignored = (ROOT / ".dockerignore").read_text().split()
    assert "models/fable" in copied and "cairn" in copied
    assert all((ROOT / path).exists() for path in copied)
    assert not set(copied) & set(ignored)
    packages = {path.parent.name for path in ROOT.glob("*/__init__.py")} - {"models", "bench", "tests"}
    assert packages <= set(copied)


def test_prometheus_configuration_is_valid():
    assert "SUCCESS" in run(tool("promtool"), "check", "config", str(DEPLOY / "prometheus.yml"))


def test_prometheus_scrapes_the_metrics_ports(compose):
    jobs = read_yaml(DEPLOY / "prometheus.yml")["scrape_configs"]
    targets = {target for job in jobs for static in job["static_configs"] for target in static["targets"]}
    served = set()
    for name in ("prefill", "decode", "gateway"):
        flags = compose["services"][name]["command"]
        served.add(f"{name}:" + next(flag.split("=")[1] for flag in flags if flag.startswith("--metrics-port=")))
    assert targets == served


def test_alert_rules_are_valid_and_fire_as_they_should():
    assert "SUCCESS" in run(tool("promtool"), "check", "rules", str(DEPLOY / "alerts.yml"))
    assert "SUCCESS" in run(tool("promtool"), "test", "rules", "alerts_test.yml", cwd=Path(__file__).parent)


def test_every_alert_is_tested():
    alerts = {rule["alert"] for group in read_yaml(DEPLOY / "alerts.yml")["groups"] for rule in group["rules"]}
    tests = read_yaml(Path(__file__).parent / "alerts_test.yml")["tests"]
    tested = {case["alertname"] for test in tests for case in test.get("alert_rule_test", []) if case["exp_alerts"]}
    assert alerts == tested


def dashboard_queries() -> list[str]:
    panels = json.loads((DEPLOY / "grafana" / "dashboard.json").read_text())["panels"]
    return [target["expr"] for panel in panels for target in panel["targets"]]


def alert_queries() -> list[str]:
    return [rule["expr"] for group in read_yaml(DEPLOY / "alerts.yml")["groups"] for rule in group["rules"]]


@pytest.mark.parametrize("expression", sorted(set(dashboard_queries() + alert_queries())))
def test_queries_name_metrics_and_labels_that_are_exported(expression):
    found = METRIC.findall(expression)
    labels = {"model_name", "instance", "job"}
    for name, matchers in found:
        assert name in EXPORTED
        labels |= EXPORTED[name]
        assert set(MATCHER.findall(matchers)) <= {"job", *EXPORTED[name]}
    for grouping in GROUPING.findall(expression):
        assert {label.strip() for label in grouping.split(",")} <= labels
    assert found or "up{" in expression


def test_the_dashboard_shows_what_it_promises():
    queries = " ".join(dashboard_queries())
    ours = {row.name for row in documented() if row.name.startswith("cairn_")}
    assert {f"cairn_{name}" for name in NOT_SHOWN} <= ours
    for name in ours - {f"cairn_{name}" for name in NOT_SHOWN}:
        assert name in queries, name


def test_queries_name_jobs_that_are_scraped():
    jobs = {job["job_name"] for job in read_yaml(DEPLOY / "prometheus.yml")["scrape_configs"]}
    named = set(re.findall(r'job="([^"]*)"', " ".join(dashboard_queries() + alert_queries())))
    assert named and named <= jobs


def test_dashboard_queries_parse(tmp_path):
    """As recording rules, with Grafana's variables filled in."""
    rules = [
        {"record": f"query_{index}", "expr": query.replace("$__rate_interval", "1m").replace("$model", ".*")}
        for index, query in enumerate(dashboard_queries())
    ]
    path = tmp_path / "rules.yml"
    path.write_text(yaml.safe_dump({"groups": [{"name": "dashboard", "rules": rules}]}))
    assert f"{len(rules)} rules found" in run(tool("promtool"), "check", "rules", str(path))


def test_dashboard_panels_do_not_overlap_and_use_the_provisioned_source():
    dashboard = json.loads((DEPLOY / "grafana" / "dashboard.json").read_text())
    source = read_yaml(DEPLOY / "grafana" / "provisioning" / "datasources" / "prometheus.yml")["datasources"][0]
    places: set[Any] = set()
    for panel in dashboard["panels"]:
        assert panel["datasource"]["uid"] == source["uid"]
        place = panel["gridPos"]
        cells = {(place["x"] + x, place["y"] + y) for x in range(place["w"]) for y in range(place["h"])}
        assert not cells & places and place["x"] + place["w"] <= 24
        places |= cells
    assert len({panel["id"] for panel in dashboard["panels"]}) == len(dashboard["panels"])
