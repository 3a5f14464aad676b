"""One Redis server: connecting from a URL, running scripts, and one kind of error for everything that goes wrong.

redis://[user:password@]host[:port][/db][?prefix=NAME]       rediss:// for TLS, with ?ca=FILE for a private CA
A password that must not stand on a command line is read from a file: redis://host?password-file=FILE.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import redis
from redis.backoff import ExponentialBackoff
from redis.retry import Retry

from chunk_store.errors import StoreUnavailable
from chunk_store.redis.prelude import PRELUDE

TIMEOUT_S = 10.0
RETRIES = 2  # a pooled connection that died with the server; every script may run twice
_OPTIONS = {"prefix", "ca", "password-file"}


class ServerFull(StoreUnavailable):
    """The server's memory is at its configured maximum."""


@dataclass(frozen=True)
class RedisAddress:
    """Where a store lives. ``prefix`` separates several stores in one database."""

    host: str
    port: int
    db: int
    username: str | None
    password: str | None = field(repr=False)
    tls: bool
    ca_file: str | None
    prefix: str


def parse_redis_url(url: str) -> RedisAddress:
    """Reads the password file that the URL names. Raises ``ValueError`` that names the part that is wrong."""
    parts = urlsplit(url)
    options = parse_qs(parts.query, keep_blank_values=True)
    path = parts.path.strip("/")
    if parts.scheme not in ("redis", "rediss") or not parts.hostname:
        raise ValueError(f"store URL: {_hidden(url)!r} must be redis://[user:password@]host[:port][/db]")
    if path and not path.isdigit():
        raise ValueError(f"store URL: the database {path!r} must be a number")
    unknown = options.keys() - _OPTIONS
    if unknown:
        raise ValueError(f"store URL: unknown options {sorted(unknown)}; known are {sorted(_OPTIONS)}")
    return RedisAddress(
        host=parts.hostname,
        port=parts.port or 6379,
        db=int(path or 0),
        username=unquote(parts.username) if parts.username else None,
        password=_password(parts.password, options.get("password-file", [None])[0]),
        tls=parts.scheme == "rediss",
        ca_file=options.get("ca", [None])[0],
        prefix=options.get("prefix", ["cairn"])[0],
    )


def _password(in_url: str | None, file: str | None) -> str | None:
    """The password in the URL or the first line of the file; None without either. Raises ``ValueError``."""
    if file is None:
        return unquote(in_url) if in_url else None
    if in_url:
        raise ValueError("store URL: a password and password-file; give one of them")
    try:
        password = Path(file).read_text().partition("\n")[0].strip()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"store URL: password-file: cannot read {file!r}: {error}") from error
    if not password:
        raise ValueError(f"store URL: password-file: {file!r} begins with an empty line")
    return password


class RedisConnection:
    """A pool of connections to one server. Thread-safe."""

    def __init__(self, address: RedisAddress) -> None:
        tls: dict[str, Any] = {"ssl": True, "ssl_ca_certs": address.ca_file} if address.tls else {}
        self.client: Any = redis.Redis(
            host=address.host,
            port=address.port,
            db=address.db,
            username=address.username,
            password=address.password,
            socket_timeout=TIMEOUT_S,
            socket_connect_timeout=TIMEOUT_S,
            health_check_interval=30,
            retry=Retry(ExponentialBackoff(cap=0.1, base=0.01), RETRIES),
            **tls,
        )
        self.prefix = f"{address.prefix}:"
        self._where = f"redis at {address.host}:{address.port}"
        self._scripts: dict[str, Any] = {}

    @contextmanager
    def errors(self) -> Iterator[None]:
        """Turns the client's errors into ``StoreUnavailable``, of a server without memory into ``ServerFull``."""
        try:
            yield
        except redis.exceptions.OutOfMemoryError as error:
            raise ServerFull(f"{self._where}: {error}") from error
        except redis.exceptions.RedisError as error:
            raise StoreUnavailable(f"{self._where}: {error}") from error

    def run(self, script: str, *arguments: str | bytes | int | float) -> Any:
        """Runs one of ``redis_scripts``. Raises ``StoreUnavailable``."""
        registered = self._scripts.get(script)
        if registered is None:
            registered = self._scripts[script] = self.client.register_script(PRELUDE + script)
        with self.errors():
            return registered(keys=[self.prefix], args=arguments)

    def name(self, suffix: str) -> str:
        """A key of this store."""
        return self.prefix + suffix

    def close(self) -> None:
        self.client.close()


def _hidden(url: str) -> str:
    """``url`` without what stands before the ``@``."""
    scheme, separator, rest = url.partition("://")
    return f"{scheme}{separator}{rest.rpartition('@')[2]}"
