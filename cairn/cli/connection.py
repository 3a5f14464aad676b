"""How a command finds the services: flags, environment, the file's table [client], or the addresses of ``cairn up``."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

from cairn.cli.arguments import UsageError, read_file
from cairn.client.client import DEFAULT_DECODE, DEFAULT_PREFILL, Client
from cairn.client.errors import InvalidRequest
from cairn.client.replicas import addresses_of
from serving.process.model_path import check_model
from serving.process.settings import FILE, SECONDS, Kind, setting, settings_of, text
from serving.process.sources import SettingError, Sources, add_flags, resolve
from serving.rpc.token_file import token_lines

GROUP = "connection"


@dataclass(frozen=True, kw_only=True)
class ConnectionOptions:
    """Where the services are, and how they are asked."""

    prefill: str = setting(text("HOST:PORT"), "the prefill service", default=DEFAULT_PREFILL, group=GROUP)
    decode: str = setting(
        Kind("HOST:PORT[,...]", lambda words: ",".join(addresses(words))),
        "the decode service, or several that have the same model",
        default=DEFAULT_DECODE,
        group=GROUP,
        repeated=True,
    )
    token: str | None = setting(
        text("TOKEN"), "bearer token that is sent", default=None, group=GROUP, secret=True, flagless=True
    )
    token_file: Path | None = setting(
        FILE, "its first token is sent; the services' own file will do", default=None, group=GROUP
    )
    tls_ca: Path | None = setting(FILE, "use TLS; PEM file of certificates to trust", default=None, group=GROUP)
    salt: str = setting(
        Kind("TEXT"), "keep this use apart from others in the cache", default="", group=GROUP, secret=True
    )
    timeout: float = setting(SECONDS, "deadline of a call", default=300.0, group=GROUP)

    @property
    def decodes(self) -> tuple[str, ...]:
        """Each decode service's address."""
        return addresses(self.decode)

    def bearer(self) -> str | None:
        """The token to send: the file's first, else the one that was given. Raises ``UsageError``."""
        if self.token_file is None:
            return self.token
        for _, words in token_lines(read_file(self.token_file)):
            return words[0]
        raise UsageError(f"--token-file: {self.token_file} holds no token")


def addresses(words: str) -> tuple[str, ...]:
    """The addresses in a setting. Raises ``ValueError``."""
    try:
        return addresses_of(words)
    except InvalidRequest as error:
        raise ValueError(error.message.removeprefix("decode: ")) from None


def add_connection_flags(parser: argparse.ArgumentParser) -> None:
    """The flags that every command which talks to the services has."""
    add_flags(parser, settings_of(ConnectionOptions))
    add_json_flag(parser)


def connection_options(args: argparse.Namespace) -> ConnectionOptions:
    """The settings that flags, environment and file give. Raises ``UsageError``."""
    try:
        sources = Sources.read(vars(args))
        sources.check_keys({"client": settings_of(ConnectionOptions)})
        found = resolve(ConnectionOptions, "client", sources)
        found.check_files()
    except SettingError as error:
        raise UsageError(str(error)) from error
    return found.options


def add_json_flag(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print JSON lines for scripts")


def open_client(args: argparse.Namespace) -> Client:
    """A client for the services that the settings name. Raises ``UsageError`` for settings that cannot be used."""
    options = connection_options(args)
    return Client(
        options.prefill,
        options.decodes,
        token=options.bearer(),
        tls=options.tls_ca,
        salt=options.salt,
        timeout_s=options.timeout,
    )


def check_model_flag(model: str) -> None:
    """Raises ``UsageError`` for a model that cannot be there: before two services load what they can to find out."""
    try:
        check_model(model)
    except ValueError as error:
        raise UsageError(f"--model: {error}") from error
