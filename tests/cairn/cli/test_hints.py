"""What a person is told to do about a service that does not answer: against real listeners."""

from __future__ import annotations

import json
import socket

import grpc
import pytest

from cairn.cli import main as cli
from cairn.cli.hints import hint, reachability
from cairn.client.errors import NotFound, Unavailable
from tests.cairn.cairn_fakes import FakeServices
from tests.certificates import certificate


@pytest.fixture
def tls(tmp_path):
    """Fakes behind TLS, and the certificate that vouches for them."""
    cert, key = certificate(tmp_path)
    fakes = FakeServices(credentials=grpc.ssl_server_credentials([(key.read_bytes(), cert.read_bytes())]))
    yield fakes, cert
    fakes.stop()


def nobody() -> str:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return f"127.0.0.1:{listener.getsockname()[1]}"


def test_nothing_listens():
    address = nobody()
    assert reachability(address, None) == (
        f"nothing listens on {address}; start both services with: cairn up --model PATH"
    )


def test_plain_text_to_tls(tls):
    fakes, cert = tls
    assert reachability(fakes.address, None) == f"{fakes.address} speaks TLS: give --tls-ca FILE"
    assert reachability(fakes.address, cert) == ""


def test_tls_to_plain_text(services, tls):
    assert "does not speak TLS: leave out --tls-ca" in reachability(services.address, tls[1])
    assert reachability(services.address, None) == ""


def test_a_certificate_of_somebody_else(tls, tmp_path):
    other, _ = certificate(tmp_path, "other")
    assert f"--tls-ca {other} does not vouch for" in reachability(tls[0].address, other)


def test_a_listener_that_says_nothing_is_given_up_on(monkeypatch):
    monkeypatch.setattr("cairn.cli.hints.PROBE_TIMEOUT_S", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        assert reachability(f"127.0.0.1:{listener.getsockname()[1]}", None) == ""


@pytest.mark.parametrize("address", ["", "nowhere", "ipv4:1.2.3.4,5.6.7.8", "unix:/tmp/x", "host:http"])
def test_other_forms_of_address_are_left_alone(address):
    assert reachability(address, None) == ""


def test_only_the_service_that_failed_is_looked_at():
    address = nobody()
    assert hint(NotFound("no such chunk", source=f"prefill service at {address}"), (address,), None) == ""
    assert hint(Unavailable("gone", source="prefill service at elsewhere:1"), (address,), None) == ""
    assert "cairn up" in hint(Unavailable("gone", source=f"prefill service at {address}"), ("x:1", address), None)


def test_commands_give_the_hint(capsys, tls):
    address = nobody()
    argv = ["chunks", "list", "--prefill", address, "--timeout", "5s"]
    assert cli.main(argv) == 1
    assert "cairn up --model PATH" in capsys.readouterr().err
    assert cli.main([*argv, "--json"]) == 1
    assert "cairn up" in json.loads(capsys.readouterr().err)["error"]["hint"]
    fakes, cert = tls
    assert cli.main(["generate", "q", "--decode", fakes.address, "--prefill", fakes.address]) == 1
    assert "speaks TLS: give --tls-ca FILE" in capsys.readouterr().err
    assert cli.main(["health", fakes.address]) == 1
    assert "speaks TLS" in capsys.readouterr().err
    assert cli.main(["health", fakes.address, "--tls-ca", str(cert)]) == 0
