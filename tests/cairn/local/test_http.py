"""What ``cairn up --http-port`` tells the gateway, as the gateway reads it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from cairn.local.http import gateway_command
from cairn.local.processes import Command
from cairn.local.services import service_commands, together_command
from decode_service.options import DecodeOptions
from gateway.options import GatewayOptions, parse
from prefill_service.options import PrefillOptions

PREFILL = PrefillOptions(model="m", store="file:///s")
DECODE = DecodeOptions(model="m", store="file:///s", prefill="", drain_s=7, log_level="warning")


def told(command: Command, monkeypatch: pytest.MonkeyPatch) -> GatewayOptions:
    words = command.argv[command.argv.index("-m") + 1 :]
    assert words[0] == "gateway"
    with monkeypatch.context() as patch:
        for name, value in (command.environment or {}).items():
            patch.setenv(name, value)
        return parse(list(words[1:]))


@pytest.mark.parametrize("together", [False, True])
def test_it_asks_the_services_that_are_started_with_it(together: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    services = (together_command(PREFILL, DECODE),) if together else service_commands(PREFILL, DECODE)
    command = gateway_command(0, services, DECODE, None)
    options = told(command, monkeypatch)
    addresses = [place.address for service in services for place in service.places]
    assert [options.prefill, options.decode] == addresses
    (place,) = command.places
    assert place.address == f"{options.http_host}:{options.http_port}" and place.address not in addresses
    assert (options.drain_s, options.log_level, options.token_file, options.tls_cert) == (7, "warning", None, None)


def test_access_and_its_table_reach_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokens, cert, key, config = (tmp_path / name for name in ("tokens", "cert", "key", "cairn.toml"))
    for path in (tokens, cert, key):
        path.write_text("stone red\n")
    config.write_text('batch_max = 3\n[gateway]\nrequests_max = 5\nlog_level = "debug"\n')
    decode = replace(DECODE, tls_cert=cert, tls_key=key, host="0.0.0.0")
    command = gateway_command(8123, service_commands(PREFILL, decode, cert), decode, tokens, cert, config)
    options = told(command, monkeypatch)
    assert (options.token_file, options.tls_cert, options.tls_key, options.tls_ca) == (tokens, cert, key, cert)
    assert (options.http_host, options.http_port, options.requests_max) == ("0.0.0.0", 8123, 5)
    assert options.log_level == "warning", "what cairn up was told goes before the file"


def test_what_the_services_were_told_by_variables_is_not_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CAIRN_METRICS_PORT", "9999")
    monkeypatch.setenv("CAIRN_CONFIG", "/nowhere")
    monkeypatch.setenv("CAIRN_REQUESTS_MAX", "6")
    command = gateway_command(0, service_commands(PREFILL, DECODE), DECODE, None)
    monkeypatch.delenv("CAIRN_METRICS_PORT")
    monkeypatch.delenv("CAIRN_CONFIG")
    options = told(command, monkeypatch)
    assert (options.metrics_port, options.requests_max) == (None, 6)
