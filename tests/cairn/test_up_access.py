"""``cairn up`` with TLS, bearer tokens and a store on Redis, used as two tenants would."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from cairn import Client, Text, Unauthorized, Unavailable
from cairn.local.services import private_tokens, service_commands
from decode_service.options import DecodeOptions
from prefill_service.options import PrefillOptions
from tests.certificates import certificate
from tests.chunk_store.servers import PASSWORD, redis_server, redis_url
from tests.models_for_tests import tiny_model_dir

DOCUMENT = "The town of Crystalton is located in Nebulonia. " * 4
QUERY = Text("Where is Crystalton located?", role="user")


@pytest.fixture(scope="module")
def up(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Any]]:
    """Both services, started by ``cairn up``; they must drain cleanly."""
    root = tmp_path_factory.mktemp("access")
    cert, key = certificate(root)
    (root / "tokens").write_text("# tenants\nstone red\nslate blue\n")
    model = tiny_model_dir(root / "model")
    redis = redis_server(root)
    redis.start()
    # What is secret comes by the environment, the rest by a file and by flags.
    (root / "cairn.toml").write_text(f'model = "{model}"\ntls_cert = "{cert}"\n[up]\nstart_timeout = "250s"\n')
    settings = {"CAIRN_TLS_KEY": str(key), "CAIRN_STORE_PASSWORD": PASSWORD}
    settings["CAIRN_STORE"] = redis_url(redis).replace(f":{PASSWORD}@", "")
    argv = [sys.executable, "-m", "cairn.cli", "up", "--json", "--config", str(root / "cairn.toml")]
    argv += ["--token-file", str(root / "tokens")]
    for port in ("--prefill-port", "--decode-port", "--prefill-metrics-port", "--decode-metrics-port"):
        argv += [port, "0"]
    argv += ["--drain-s", "100"]
    temporary = root / "temporary"
    temporary.mkdir()
    environment = {**os.environ, **settings, "TMPDIR": str(temporary)}
    with (root / "up.log").open("w+") as log:
        process = subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=log, text=True, env=environment)
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        assert line and json.loads(line)["event"] == "ready", line + (root / "up.log").read_text()[-3000:]
        yield {**json.loads(line), "cert": cert, "log": root / "up.log", "pid": process.pid, "out": line}
        process.terminate()
        out, _ = process.communicate(timeout=250)
        assert json.loads(out) == {"event": "stopped", "reason": "asked", "clean": True}
        assert process.returncode == 0
        assert not list(temporary.glob("cairn-*")), "the tokens made at the start are gone"
    finally:
        if process.poll() is None:
            process.terminate()
            process.wait(30)
        redis.kill()


def client(up: dict[str, Any], token: str | None, *, tls: bool = True) -> Client:
    addresses = up["prefill"]["address"], up["decode"]["address"]
    return Client(*addresses, token=token, tls=up["cert"] if tls else None, timeout_s=60)


def test_each_tenant_has_a_cache_of_its_own(up: dict[str, Any]) -> None:
    sources = {}
    for token in ("stone", "slate"):
        with client(up, token) as tenant:
            # Given as text it is registered by the decode service, and its KV asked of the prefill service.
            segments = [Text(DOCUMENT, role="document"), QUERY]
            chunk = tenant.prefill(DOCUMENT, role="document", durable=True)
            first, again = (tenant.generate([chunk, QUERY], max_tokens=4).finish() for _ in range(2))
            sources[token] = (chunk.computed_tokens, first.reuse.segments[0].source, again.reuse.segments[0].source)
            assert first.token_ids == again.token_ids == tenant.generate(segments, max_tokens=4).finish().token_ids
    tokens = sources["stone"][0]
    assert tokens > 0
    assert sources == {token: (tokens, "store", "device") for token in ("stone", "slate")}, "computed once for each"


def test_the_decode_service_may_ask_for_any_tenant(up: dict[str, Any]) -> None:
    """KV that is missing goes decode -> prefill under the tenant's salt, with a token that has none itself."""
    with client(up, "slate") as tenant:
        chunks = [tenant.prefill(f"Note {number} of the town.", role="document", durable=True) for number in range(2)]
        result = tenant.generate([*chunks, QUERY], max_tokens=2).finish()
        assert [segment.source for segment in result.reuse.segments[:2]] == ["store", "computed"]


def test_nobody_comes_in_without_a_token_or_without_tls(up: dict[str, Any]) -> None:
    for token in (None, "pebble"):
        with client(up, token) as stranger:
            with pytest.raises(Unauthorized):
                stranger.prefill("text")
            with pytest.raises(Unauthorized):
                stranger.generate(["text"]).finish()
    with client(up, "stone", tls=False) as careless, pytest.raises(Unavailable):
        careless.loads()


def test_health_over_tls_and_nothing_secret_in_the_log(up: dict[str, Any]) -> None:
    argv = [sys.executable, "-m", "cairn.cli", "health", up["prefill"]["address"], up["decode"]["address"]]
    checked = subprocess.run([*argv, "--tls-ca", str(up["cert"])], capture_output=True, text=True, timeout=60)
    assert (checked.returncode, checked.stdout.count("SERVING")) == (0, 2)
    log = up["log"].read_text() + up["out"]
    assert PASSWORD not in log and "stone" not in log and "slate" not in log


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="reads command lines in /proc")
def test_no_secret_is_on_a_command_line(up: dict[str, Any]) -> None:
    """What every user of the machine sees of ``cairn up`` and of both services."""
    children = Path(f"/proc/{up['pid']}/task/{up['pid']}/children").read_text().split()
    seen = {pid: Path(f"/proc/{pid}/cmdline").read_text() for pid in (str(up["pid"]), *children)}
    assert sum("_service" in line for line in seen.values()) == 2, seen
    words = {word for line in seen.values() for word in line.split("\0")}
    (tokens,) = (word for word in words if word.endswith("/tokens") and "cairn-" in word)
    made = Path(tokens).read_text().splitlines()[0]
    for line in seen.values():
        assert not any(secret in line for secret in (PASSWORD, "stone", "slate", made)), line


def test_flags_of_access_reach_both_services(tmp_path: Path) -> None:
    own, cert = tmp_path / "tokens", tmp_path / "cert.pem"
    own.write_text("stone red\n")
    with private_tokens(own) as private:
        assert private is not None
        lines = private.read_text().splitlines()
        assert len(lines[0].split()) == 1 and len(lines[0]) > 30 and lines[1:] == ["stone red"]
        assert private.parent.stat().st_mode & 0o077 == 0, "for this user only"
        shared: dict[str, Any] = {"model": "m", "store": "s", "tls_cert": cert, "tls_key": cert}
        commands = service_commands(
            PrefillOptions(**shared, token_file=private),
            DecodeOptions(**shared, token_file=own, prefill="", prefill_token_file=private),
            cert,
        )
        prefill, decode = (" ".join(command.argv) for command in commands)
    assert not private.exists()
    assert f"--token-file {private}" in prefill and f"--token-file {own}" in decode
    assert f"--prefill-token-file {private}" in decode and f"--prefill-tls-ca {cert}" in decode
    assert "--prefill-t" not in prefill
    for argv in (prefill, decode):
        assert f"--tls-cert {cert} --tls-key {cert}" in argv
    with private_tokens(None) as none:
        assert none is None
