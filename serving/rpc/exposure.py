"""Who can reach an address that we listen on, and what must stand in between."""

from __future__ import annotations

import ipaddress
import socket


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches ``host``; a name counts as what it resolves to."""
    try:
        return _is_loopback(host.strip("[]"))
    except ValueError:
        pass
    try:
        found = {str(place[4][0]) for place in socket.getaddrinfo(host, None)} if host else set()
    except (OSError, UnicodeError):
        return False
    return bool(found) and all(_is_loopback(place) for place in found)


def exposure_refusal(host: str, *, tokens: bool, tls: bool, insecure: bool) -> str:
    """Why this may not be served, and the remedy; "" if it may."""
    if tokens or tls or insecure or is_loopback(host):
        return ""
    return (
        f"--host: {host} is reached from other machines, and neither tokens nor TLS are set: anyone could use the "
        "service and read its chunks; give --token-file, and --tls-cert with --tls-key, or say --insecure if the "
        "network in front of it is trusted"
    )


def exposure_warning(host: str, *, tokens: bool, tls: bool, insecure: bool) -> str:
    """What is missing of the two, for whoever starts it; "" if nothing is."""
    if (tokens and tls) or insecure or is_loopback(host):
        return ""
    if tokens:
        return f"{host} is reached from other machines without TLS: tokens and prompts can be read on the way"
    return f"{host} is reached from other machines and there are no tokens: everyone is let in"


def _is_loopback(address: str) -> bool:
    found = ipaddress.ip_address(address.partition("%")[0])
    mapped = found.ipv4_mapped if found.version == 6 else None
    return (mapped or found).is_loopback
