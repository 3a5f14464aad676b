"""Who can reach an address that we listen on, and what must stand in between."""

from __future__ import annotations

from serving.rpc.addresses import resolves_to_loopback


def exposure_refusal(host: str, *, tokens: bool, tls: bool, insecure: bool) -> str:
    """Why this may not be served, and the remedy; "" if it may."""
    if tokens or tls or insecure or resolves_to_loopback(host):
        return ""
    return (
        f"{host} is reached from other machines, and neither tokens nor TLS are set: anyone could use the "
        "service and read its chunks; give --token-file, and --tls-cert with --tls-key, or say --insecure if the "
        "network in front of it is trusted"
    )


def exposure_warning(host: str, *, tokens: bool, tls: bool, insecure: bool) -> str:
    """What is missing of the two, for whoever starts it; "" if nothing is."""
    if (tokens and tls) or insecure or resolves_to_loopback(host):
        return ""
    if tokens:
        return f"{host} is reached from other machines without TLS: tokens and prompts can be read on the way"
    return f"{host} is reached from other machines and there are no tokens: everyone is let in"
