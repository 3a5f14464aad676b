"""How a command finds the services: flags, then environment, then the addresses of ``cairn up``."""

from __future__ import annotations

import argparse
import os
import re
from pathlib import Path

from cairn.client import DEFAULT_DECODE, DEFAULT_PREFILL, Client
from cairn.requests import Part
from cairn.types import ChunkRef, Text

_CHUNK_ID = re.compile(r"[0-9a-f]{64}")
_ID_PREFIX = re.compile(r"[0-9a-f]{6,63}")


class UsageError(Exception):
    """The command line cannot be carried out as it was typed; nothing was sent."""


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
    group.add_argument("--token-file", type=Path, metavar="FILE", help="bearer token (environment: CAIRN_TOKEN)")
    group.add_argument("--tls-ca", type=Path, metavar="FILE", help="use TLS; PEM file of certificates to trust")
    group.add_argument("--salt", default="", help="keep this use apart from others in the cache")
    group.add_argument(
        "--timeout", type=positive_seconds, default=300.0, metavar="SECONDS", help="deadline of a call (default 300)"
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
    """The bearer token of the file or of ``CAIRN_TOKEN``. Raises ``UsageError``."""
    if token_file is None:
        return os.environ.get("CAIRN_TOKEN") or None
    return _read(token_file).strip()


def read_part(word: str, client: Client, role: str = "", type: str = "") -> Part:
    """One part of a prompt from the command line: ``:NAME`` (or the start of an id), a whole chunk id, ``@FILE``,
    or text. Raises ``UsageError``."""
    if word.startswith(":"):
        return find_chunk(client, word[1:])
    if _CHUNK_ID.fullmatch(word):
        return ChunkRef(word)
    text = _read(Path(word[1:])) if word.startswith("@") else word
    return Text(text, type=type, role=role)


def find_chunk(client: Client, word: str) -> ChunkRef:
    """The chunk that a name, a whole id or the start of an id (6 digits or more) stands for.

    Raises ``UsageError`` unless it stands for exactly one.
    """
    if not word:
        raise UsageError("give a chunk's name, its id, or the first 6 digits of its id")
    if _CHUNK_ID.fullmatch(word):
        return ChunkRef(word)
    found = {chunk.id for chunk in client.chunks(name=word)}
    if not found and _ID_PREFIX.fullmatch(word):
        found = {chunk.id for chunk in client.chunks(page_size=1000) if chunk.id.startswith(word)}
    if len(found) != 1:
        raise UsageError(f"{word!r} stands for {len(found)} chunks; see: cairn chunks list")
    return ChunkRef(found.pop())


def positive_seconds(text: str) -> float:
    """An argparse type: a positive number of seconds."""
    seconds = float(text)
    if not 0 < seconds < float("inf"):
        raise argparse.ArgumentTypeError(f"must be a positive number of seconds, not {text}")
    return seconds


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"cannot read {path}: {error}") from error
