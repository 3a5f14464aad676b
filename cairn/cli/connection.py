"""How a command finds the services: flags, then environment, then the addresses of ``cairn up``."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from cairn.cli.arguments import UsageError, read_file, typed
from cairn.client.client import DEFAULT_DECODE, DEFAULT_PREFILL, Client
from chunk_store.quantities import parse_seconds
from serving.process.model_path import check_model
from serving.rpc.token_file import token_lines


def add_connection_flags(parser: argparse.ArgumentParser) -> None:
    """The flags that every command which talks to the services has."""
    group = parser.add_argument_group("connection")
    environment = os.environ
    group.add_argument(
        "--prefill",
        metavar="HOST:PORT",
        default=environment.get("CAIRN_PREFILL") or DEFAULT_PREFILL,
        help=f"prefill service (environment: CAIRN_PREFILL; default {DEFAULT_PREFILL})",
    )
    group.add_argument(
        "--decode",
        metavar="HOST:PORT",
        default=environment.get("CAIRN_DECODE") or DEFAULT_DECODE,
        help=f"decode service (environment: CAIRN_DECODE; default {DEFAULT_DECODE})",
    )
    group.add_argument(
        "--token-file",
        type=Path,
        metavar="FILE",
        help="its first token is sent; the services' own file will do (environment: CAIRN_TOKEN, the token itself)",
    )
    group.add_argument("--tls-ca", type=Path, metavar="FILE", help="use TLS; PEM file of certificates to trust")
    group.add_argument("--salt", default="", help="keep this use apart from others in the cache")
    group.add_argument(
        "--timeout",
        type=typed(parse_seconds),
        default=300.0,
        metavar="DURATION",
        help="deadline of a call, 90s or 5m (default 300)",
    )
    add_json_flag(parser)


def add_json_flag(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print JSON lines for scripts")


def open_client(args: argparse.Namespace) -> Client:
    """A client for the services that the flags name. Raises ``UsageError`` for a token file that cannot be read."""
    return Client(
        args.prefill,
        args.decode,
        token=read_token(args.token_file),
        tls=args.tls_ca,
        salt=args.salt,
        timeout_s=args.timeout,
    )


def read_token(token_file: Path | None) -> str | None:
    """The bearer token of the file or of ``CAIRN_TOKEN``; None if there is neither. Raises ``UsageError``.

    The file may be the services' own (``TOKEN [SALT] ...`` a line, ``#`` begins a comment): its first token counts.
    """
    if token_file is None:
        return os.environ.get("CAIRN_TOKEN") or None
    for _, words in token_lines(read_file(token_file)):
        return words[0]
    raise UsageError(f"--token-file: {token_file} holds no token")


def check_model_flag(model: str) -> None:
    """Raises ``UsageError`` for a model that cannot be there: before two services load what they can to find out."""
    try:
        check_model(model)
    except ValueError as error:
        raise UsageError(f"--model: {error}") from error
