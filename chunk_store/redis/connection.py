"""One Redis server: connecting from a URL, running scripts, and one kind of error for everything that goes wrong.

redis://[user:password@]host[:port][/db][?prefix=NAME]       rediss:// for TLS, with ?ca=FILE for a private CA
A password need not stand in the URL: redis://host?password-file=FILE, or the service's own option.
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
from chunk_store.password import password_in
from chunk_store.redis.scripts.prelude import PRELUDE

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


def parse_redis_url(url: str, password: str | None = None) -> RedisAddress:
    """The server at ``url``; ``password`` is for a URL that has none, nor a password file, of its own.

    Raises ``ValueError`` that names the part that is wrong. It shows nothing that may be part of a password.
    """
    try:
        parts = urlsplit(url)
        host, port = parts.hostname, parts.port
    except ValueError:  # whose words quote the URL
        parts, host, port = urlsplit(""), None, None
    if parts.scheme not in ("redis", "rediss") or not host or parts.fragment or "@" in parts.path:
        wanted = "redis://[user:password@]host[:port][/db][?prefix=NAME]"
        raise ValueError(f"store URL: must be {wanted}, with / ? # and @ of a password percent-encoded")
    path = parts.path.strip("/")
    if path and not path.isdigit():
        raise ValueError(f"store URL: the database {path!r} must be a number")
    options = parse_qs(parts.query, keep_blank_values=True)
    unknown = sorted(options.keys() - _OPTIONS)
    if unknown:
        named = "" if "@" in parts.query else f" {unknown}"
        raise ValueError(f"store URL: unknown options{named}; known are {sorted(_OPTIONS)}")
    own = unquote(parts.password) if parts.password else None
    if "password-file" in options:
        if own:
            raise ValueError("store URL: a password and password-file; give one of them")
        own = password_in(Path(options["password-file"][0]), "store URL: password-file")
    return RedisAddress(
        host=host,
        port=port or 6379,
        db=int(path or 0),
        username=unquote(parts.username) if parts.username else None,
        password=own or password,
        tls=parts.scheme == "rediss",
        ca_file=options.get("ca", [None])[0],
        prefix=options.get("prefix", ["cairn"])[0],
    )


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
        """Runs one of ``scripts``. Raises ``StoreUnavailable``."""
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
