"""What ``HOST:PORT`` names."""

from __future__ import annotations

import pytest

from serving.rpc.addresses import host_and_port, is_loopback, resolves_to_loopback


@pytest.mark.parametrize(
    ("address", "host", "port"),
    [("127.0.0.1:80", "127.0.0.1", "80"), ("[::1]:80", "::1", "80"), ("name", "", "name"), ("a.b:", "a.b", "")],
)
def test_host_and_port_are_as_written(address: str, host: str, port: str) -> None:
    assert host_and_port(address) == (host, port)


@pytest.mark.parametrize("host", ["127.0.0.1", "127.9.9.9", "::1", "[::1]", "::ffff:127.0.0.1", "localhost"])
def test_this_machine_alone(host: str) -> None:
    assert is_loopback(host) and resolves_to_loopback(host)


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "10.0.0.5", "fe80::1%eth0", "::ffff:10.0.0.5", "", "ipv4:127.0.0.1"])
def test_others_too(host: str) -> None:
    assert not is_loopback(host) and not resolves_to_loopback(host)
