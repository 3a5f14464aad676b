"""What the gateway was told. Imports nothing heavy."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from cairn.client.client import DEFAULT_DECODE, DEFAULT_PREFILL
from serving.process.logs import FORMATS, LEVELS
from serving.process.settings import (
    COUNT,
    FILE,
    PORT,
    SECONDS,
    SIZE,
    SWITCH,
    choice,
    or_zero,
    setting,
    settings_of,
    text,
)
from serving.process.sources import EPILOG, Resolved, SettingError, Sources, add_flags, resolve
from serving.rpc.addresses import resolves_to_loopback
from serving.rpc.exposure import exposure_refusal

BOUNDS = "bounds"


@dataclass(frozen=True, kw_only=True)
class GatewayOptions:
    """Where it listens, whom it asks, and what a caller may take of it."""

    prefill: str = setting(text("HOST:PORT"), "the prefill service", default=DEFAULT_PREFILL)
    decode: str = setting(text("HOST:PORT,..."), "the decode services", default=DEFAULT_DECODE)
    tls_ca: Path | None = setting(FILE, "TLS to the services; PEM file of certificates to trust", default=None)
    http_host: str = setting(text("ADDRESS"), "address to listen on", default="127.0.0.1", group="addresses")
    http_port: int = setting(PORT, "of the HTTP; 0 is any free one", default=8000, group="addresses")
    http_names: str | None = setting(
        text("NAME,..."),
        "further names that requests may come to (Host) where it listens on loopback and has no tokens",
        default=None,
        unset="localhost and the address",
        group="addresses",
    )
    metrics_port: int | None = setting(
        PORT, "of the Prometheus metrics alone; 0 is any free one", default=None, unset="none", group="addresses"
    )
    token_file: Path | None = setting(
        FILE,
        "the services' token file: whose token is not in it is turned away before anything is read",
        default=None,
        unset="the services say who may call",
        group="access",
    )
    tls_cert: Path | None = setting(FILE, "certificate chain, PEM", default=None, group="access")
    tls_key: Path | None = setting(FILE, "private key, PEM", default=None, group="access")
    insecure: bool = setting(SWITCH, "listen beyond this machine without tokens and TLS", default=False, group="access")
    requests_max: int = setting(
        COUNT, "requests at once; with a token file one token has half of them", default=400, group=BOUNDS
    )
    connections_max: int = setting(COUNT, "open connections; then the longest idle goes", default=1024, group=BOUNDS)
    body_max: int = setting(SIZE, "of a request's body", default=8 * 2**20, unset="8MiB", group=BOUNDS)
    bodies_max: int = setting(SIZE, "of all bodies at once", default=256 * 2**20, unset="256MiB", group=BOUNDS)
    request_timeout_s: float = setting(SECONDS, "for a whole answer", default=600.0, group=BOUNDS)
    drain_s: float = setting(or_zero(SECONDS), "for running requests at the end", default=20.0)
    log_level: str = setting(choice(*LEVELS), "what is logged", default="info")
    log_format: str = setting(choice(*FORMATS), "of the lines on stderr", default="text")

    @property
    def hosts(self) -> frozenset[str] | None:
        """The names that requests may come to; None for any."""
        if self.token_file is not None or not resolves_to_loopback(self.http_host):
            return None
        further = (self.http_names or "").replace(",", " ").lower().split()
        return frozenset({"localhost", "127.0.0.1", "::1", self.http_host.lower(), *further})


def parse(words: Sequence[str] | None = None) -> GatewayOptions:
    """The options of this command line, environment and file; ends the program with a message for a bad one."""
    parser = argparse.ArgumentParser(
        prog="python -m gateway", description="OpenAI's HTTP API over the services.", epilog=EPILOG, allow_abbrev=False
    )
    add_flags(parser, settings_of(GatewayOptions))
    try:
        sources = Sources.read(vars(parser.parse_args(words)))
        sources.check_keys({"gateway": settings_of(GatewayOptions)})
        resolved = resolve(GatewayOptions, "gateway", sources)
        check(resolved)
    except SettingError as error:
        parser.error(str(error))
    return resolved.options


def check(resolved: Resolved[GatewayOptions]) -> None:
    """Raises ``SettingError`` for settings that contradict each other, and for files that cannot be read."""
    options = resolved.options
    for one, other in (("tls_cert", "tls_key"), ("tls_key", "tls_cert")):
        if getattr(options, one) is not None and getattr(options, other) is None:
            raise SettingError(resolved.about(one, "--tls-cert and --tls-key: give both or neither"))
    tokens, tls = options.token_file is not None, options.tls_cert is not None
    if refusal := exposure_refusal(options.http_host, tokens=tokens, tls=tls, insecure=options.insecure):
        raise SettingError(resolved.about("http_host", refusal))
    resolved.check_files()
