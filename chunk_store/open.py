"""From a URL to a store. The only place that knows which backends exist."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote, urlsplit

from chunk_store.ledger import Ledger
from chunk_store.limits import StoreLimits
from chunk_store.local.blobs import Durability, FileBlobs
from chunk_store.local.index import INDEX
from chunk_store.local.ledger import local_ledger
from chunk_store.shared_store import SharedStore

if TYPE_CHECKING:
    from chunk_store.redis.connection import RedisAddress

SCHEMES = ("file", "redis", "rediss", "mooncake")
_SERVER = re.compile(r"(?:[^@/]*@)?((?:[\w.-]+|\[[\da-fA-F:.]+\])(?::\d+)?(?:/\d*)?)")  # behind user and password
_SHOWN_OPTIONS = ("prefix", "ca", "password-file", "host", "buffer_mib")


def open_store(
    url: str,
    *,
    password: str | None = None,
    capacity_nbytes: int | None = None,
    records_max: int | None = None,
    quarantine_s: int | None = None,
    durability: Durability = Durability.PROCESS,
) -> SharedStore:
    """The store at ``url``: ``file:///DIR`` (created if it is not there), ``redis://...``, ``rediss://...``
    or ``mooncake://...``; ``password`` is the server's, for a URL that has none of its own.

    ``capacity_nbytes`` (bytes, headers included), ``records_max`` and ``quarantine_s`` (how long a directory keeps bad
    data) are properties of the store, shared by every process: given, they are set; None keeps what the store has
    (16 GiB, 100 000 and 7 days when it is new). What a commit to a directory survives is ``durability``; a server's
    durability is in its own configuration. Raises ``ValueError`` for a URL it does not know, ``StoreUnavailable`` when
    the store cannot be reached or written, ``StoreTooNew``.
    """
    limits = StoreLimits(capacity_nbytes, records_max, quarantine_s)
    scheme = url.partition(":")[0].lower()
    if scheme == "file":
        return _open_file(url, limits, durability)
    if scheme in ("redis", "rediss"):
        return _open_redis(url, password, limits)
    if scheme == "mooncake":
        return _open_mooncake(url, password, limits)
    known = ", ".join(f"{scheme}://" for scheme in SCHEMES)
    raise ValueError(f"store URL: {shown_url(url)!r} starts with none of {known}; for a directory write file:///DIR")


def shown_url(url: str) -> str:
    """``url`` as logs, errors and answers show it: without user and password, and with plain options only.

    Of a URL that is not clear, which may have a password in an unexpected place, nothing but the scheme is shown.
    """
    scheme, separator, rest = url.partition("://")
    place, mark, query = rest.partition("?")
    if scheme == "file":
        host, slash, path = rest.partition("/")
        return f"file://{host.rpartition('@')[2]}{slash}{path}"
    clear = None if "@" in query or "#" in query else _SERVER.fullmatch(place)
    if clear is None:
        return f"{scheme}://***" if separator else "***"
    options = query.split("&") if mark else []
    plain = [option for option in options if option.partition("=")[0] in _SHOWN_OPTIONS]
    shown = "&".join(plain if len(plain) == len(options) else [*plain, "..."])
    return f"{scheme}://{clear[1]}{mark}{shown}"


def _open_file(url: str, limits: StoreLimits, durability: Durability) -> SharedStore:
    parts = urlsplit(url)
    if parts.netloc not in ("", "localhost") or not parts.path.startswith("/") or parts.query or parts.fragment:
        raise ValueError(f"store URL: {shown_url(url)!r} must be file:///DIR with an absolute path (three slashes)")
    root = Path(unquote(parts.path))
    synchronous = "FULL" if durability is Durability.POWER else "NORMAL"
    return SharedStore(local_ledger(root / INDEX, limits, synchronous), FileBlobs(root, durability))


def _open_redis(url: str, password: str | None, limits: StoreLimits) -> SharedStore:
    try:
        from chunk_store.redis.blobs import ValueBlobs
        from chunk_store.redis.connection import RedisConnection, parse_redis_url
        from chunk_store.redis.ledger import redis_ledger
        from chunk_store.redis.values import RedisValues
        from chunk_store.redis.wire import RedisWire
    except ImportError as error:
        raise ValueError("store URL: redis:// needs the redis client: pip install 'cairn[redis]'") from error
    address = parse_redis_url(url, password)
    connection = RedisConnection(address)
    blobs = ValueBlobs(RedisValues(connection, RedisWire(address)), connection)
    return SharedStore(redis_ledger(connection, limits), blobs)


def _open_mooncake(url: str, password: str | None, limits: StoreLimits) -> SharedStore:
    """The ledger of ``redis://`` with Mooncake's memory for the data."""
    try:
        import mooncake.store  # noqa: F401

        from chunk_store.mooncake.client import connect, parse_mooncake_url
        from chunk_store.redis.connection import parse_redis_url
    except ImportError as error:
        remedy = "pip install 'cairn[redis,mooncake]', and libibverbs1 from the distribution"
        raise ValueError(f"store URL: mooncake:// needs its client ({error}): {remedy}") from error
    address = parse_mooncake_url(url)
    metadata = _open_redis(address.redis_url, password, limits)
    redis = parse_redis_url(address.redis_url, password)
    return mooncake_store(connect(address, segment_nbytes=0), redis, metadata.ledger)


def mooncake_store(client: Any, redis: RedisAddress, ledger: Ledger) -> SharedStore:
    """A store over a Mooncake client that is already connected; closing the store closes the client."""
    from chunk_store.mooncake.values import MooncakeValues
    from chunk_store.redis.blobs import ValueBlobs
    from chunk_store.redis.connection import RedisConnection

    metadata = RedisConnection(redis)
    return SharedStore(ledger, ValueBlobs(MooncakeValues(client, metadata), metadata))
