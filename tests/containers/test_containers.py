"""The compose files with a real engine: answers from outside, restarts, who may do what inside, what is watched."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from cairn import Client, Text, Unauthorized
from cairn.demo.examples import Examples
from tests.containers.deployment import ROOT, Deployment, Engine

DOCUMENT = "crystalton.txt"
TOKEN = "own-token-of-the-decode-services"
PASSWORD = 'quartz "7'
IMAGE_NBYTES_MAX = 1_500_000_000


def ask(deployment: Deployment, decode: str = "CAIRN_DECODE_PORT", token: str | None = None) -> list[str]:
    """Asks about a document from outside; checks the answer; the sources of its parts."""
    examples = Examples.read(ROOT / "examples")
    known = next(question for question in examples.questions if question.document == DOCUMENT)
    prefill = deployment.address("CAIRN_PREFILL_PORT")
    with Client(prefill, deployment.address(decode), token=token, timeout_s=120) as client:
        system = client.prefill(examples.system, type="system_prompt", role="system", durable=True)
        chunk = client.prefill(examples.documents[DOCUMENT], role="document", context=[system], durable=True)
        stream = client.generate([system, chunk, Text(known.question, role="user")], max_tokens=32)
        answer = "".join(delta.text for delta in stream)
    assert answer.strip() == known.answer
    return [part.source for part in stream.result.reuse.segments[:2]]


def check_confined(deployment: Deployment, *services: str) -> None:
    """No capability, no way to a new one, nothing to write on but volumes, memory bounded."""
    for service in services:
        status = deployment.execute(service, "cat", "/proc/1/status")
        fields = {line.partition(":")[0]: line.partition(":")[2].strip() for line in status.splitlines()}
        assert int(fields["CapEff"], 16) == int(fields["CapBnd"], 16) == 0, service
        assert fields["NoNewPrivs"] == "1", service
        assert deployment.attempt("exec", "-T", service, "touch", "/usr/made").returncode != 0, service
        host = deployment.inspect(service)["HostConfig"]
        assert host["ReadonlyRootfs"] and host["Memory"] > 0, service


class TestOneHost:
    @pytest.fixture(scope="class")
    @classmethod
    def running(cls, engine: Engine, image: str) -> Iterator[Deployment]:
        deployment = Deployment(engine, ["compose.yaml"])
        try:
            deployment.up("prefill", "decode", "prometheus")
            yield deployment
        finally:
            deployment.down()

    def test_the_image_is_small_and_its_user_is_not_root(self, engine: Engine, running: Deployment) -> None:
        found = engine.image("cairn")
        assert found is not None and found["Config"]["User"] == "cairn"
        assert found["Size"] <= IMAGE_NBYTES_MAX

    def test_answers_survive_a_restart_of_each_service(self, running: Deployment) -> None:
        ask(running)
        for service in ("decode", "prefill"):
            running.compose("restart", service)
            running.wait_healthy(service)
            assert set(ask(running)) <= {"store", "device"}

    def test_services_are_confined(self, running: Deployment) -> None:
        check_confined(running, "prefill", "decode", "prometheus")
        for service in ("prefill", "decode"):
            assert running.execute(service, "id", "-un") == "cairn"

    def test_the_volumes_belong_to_the_service(self, running: Deployment) -> None:
        ask(running)
        for place in ("/var/lib/cairn", "/var/cache/cairn"):
            assert running.execute("prefill", "stat", "-c", "%U %a", place) == "cairn 700"
        owners = running.execute("decode", "find", "/var/lib/cairn", "-printf", "%u\n").split()
        assert len(owners) > 3 and set(owners) == {"cairn"}

    def test_prometheus_reaches_both(self, running: Deployment) -> None:
        running.wait_targets({"prefill:9471", "decode:9472"})


class TestOnRedis:
    @pytest.fixture(scope="class")
    @classmethod
    def running(cls, engine: Engine, image: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployment]:
        secrets = tmp_path_factory.mktemp("secrets")
        (secrets / "redis_password").write_text(PASSWORD + "\n")
        (secrets / "tokens").write_text(f"{TOKEN}\n")
        files: list[str | Path] = ["compose.yaml", "deploy/compose.redis.yaml"]
        pinned = yaml.safe_load((ROOT / files[1]).read_text())["services"]["redis"]["image"]
        if engine.image(pinned) is None and engine.image("redis:7") is not None:
            files.append(Path(__file__).parent / "standins.yaml")
        deployment = Deployment(engine, files, {"CAIRN_SECRETS": str(secrets)})
        try:
            deployment.up("redis", "prefill", "prefill2", "decode", "decode2", "prometheus")
            yield deployment
        finally:
            deployment.down()

    def test_what_one_computed_all_use_and_a_restart_of_redis_keeps_it(self, running: Deployment) -> None:
        ask(running, token=TOKEN)
        assert ask(running, "CAIRN_DECODE2_PORT", TOKEN) == ["store", "store"]
        running.compose("restart", "redis", "decode2")
        for service in ("redis", "decode2"):
            running.wait_healthy(service)
        assert ask(running, "CAIRN_DECODE2_PORT", TOKEN) == ["store", "store"]

    def test_a_token_is_needed(self, running: Deployment) -> None:
        with pytest.raises(Unauthorized):
            ask(running)

    def test_no_secret_stands_in_a_command_or_an_environment(self, running: Deployment) -> None:
        for service in ("redis", "prefill", "prefill2", "decode", "decode2"):
            found = running.inspect(service)
            assert PASSWORD.split()[0] not in json.dumps(found) and TOKEN not in json.dumps(found), service
            for secret in (PASSWORD, TOKEN):
                seen = running.execute(service, "sh", "-c", "cat /proc/[0-9]*/cmdline /proc/1/environ | tr '\\0' ' '")
                assert secret not in seen, service

    def test_services_are_confined(self, running: Deployment) -> None:
        check_confined(running, "redis", "prefill", "prefill2", "decode", "decode2", "prometheus")
        assert running.execute("redis", "id", "-u") == "999"

    def test_prometheus_reaches_all(self, running: Deployment) -> None:
        running.wait_targets({"prefill:9471", "prefill2:9471", "decode:9472", "decode2:9472"})


class TestOnAGpu:
    """compose.gpu.yaml on the CPU: everything but the devices that it reserves and the image that it builds."""

    @pytest.fixture(scope="class")
    @classmethod
    def running(cls, engine: Engine, image: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployment]:
        choices = {
            "CAIRN_DEVICE": "cpu",
            "CAIRN_MEMORY": "4g",
            "CAIRN_STORE_CAPACITY": "512MiB",
        }
        files = ["compose.yaml", "deploy/compose.gpu.yaml"]
        resolved = yaml.safe_load(Deployment(engine, files, choices).compose("config"))
        for name in ("prefill", "decode"):
            del resolved["services"][name]["deploy"]
            resolved["services"][name]["image"] = image
        path = tmp_path_factory.mktemp("gpu") / "compose.yaml"
        path.write_text(yaml.safe_dump(resolved))
        deployment = Deployment(engine, [path], choices)
        deployment.ports = {name: int(port) for name, port in ports_of(resolved).items()}
        try:
            deployment.up("prefill", "decode")
            yield deployment
        finally:
            deployment.down()

    def test_the_store_is_memory_that_both_share(self, running: Deployment) -> None:
        ask(running)
        assert set(ask(running)) <= {"store", "device"}
        for service in ("prefill", "decode"):
            kind = running.execute(service, "stat", "-f", "-c", "%T", "/var/lib/cairn")
            assert kind == "tmpfs", service
            assert running.execute(service, "stat", "-c", "%U %a", "/var/lib/cairn") == "cairn 700"

    def test_services_are_confined(self, running: Deployment) -> None:
        check_confined(running, "prefill", "decode")
        assert running.inspect("decode")["HostConfig"]["ShmSize"] == 1 << 30


def ports_of(resolved: dict) -> dict[str, int]:
    """The host's ports in a resolved project, by the variable that chose them."""
    found = {}
    for name, service in (("CAIRN_PREFILL_PORT", "prefill"), ("CAIRN_DECODE_PORT", "decode")):
        (port,) = resolved["services"][service]["ports"]
        found[name] = int(port["published"] if isinstance(port, dict) else port.split(":")[1])
    return found
