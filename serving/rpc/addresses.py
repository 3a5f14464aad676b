"""``HOST:PORT``, and whether only this machine is reached there."""

from __future__ import annotations

import ipaddress
import socket


def host_and_port(address: str) -> tuple[str, str]:
    """Both as written; the host without brackets."""
    host, _, port = address.rpartition(":")
    return host.strip("[]"), port


def is_loopback(host: str) -> bool:
    """Whether ``host`` is an address of this machine alone, or ``localhost``; no name is looked up."""
    try:
        found = ipaddress.ip_address(host.strip("[]").partition("%")[0])
    except ValueError:
        return host == "localhost"
    mapped = found.ipv4_mapped if found.version == 6 else None
    return (mapped or found).is_loopback


def resolves_to_loopback(host: str) -> bool:
    """``is_loopback`` of everything that ``host``, an address or a name, resolves to."""
    if is_loopback(host):
        return True
    try:
        found = {str(place[4][0]) for place in socket.getaddrinfo(host, None)} if host else set()
    except (OSError, UnicodeError):
        return False
    return bool(found) and all(is_loopback(place) for place in found)
