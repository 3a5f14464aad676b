"""One Mooncake cluster: connecting, and what its return codes mean.

    mooncake://MASTER[:port]?redis=URL[&host=ADDRESS][&buffer_mib=N]

``redis`` is the percent-encoded URL of the Redis server that holds the metadata; ``host`` this machine's address as
others reach it (127.0.0.1), ``buffer_mib`` the client's transfer buffer (256). Mooncake's transfer ports listen on all
interfaces and ask for no password: a trusted network only.
"""

from __future__ import annotations

import socket
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import parse_qs, urlsplit

from chunk_store.errors import StoreUnavailable

MASTER_PORT = 50051
BUFFER_MIB = 256
CONNECT_TIMEOUT_S = 5.0
NO_AVAILABLE_HANDLE = -200
REPLICA_IS_NOT_READY = -703
OBJECT_NOT_FOUND = -704
_OPTIONS = {"redis", "host", "buffer_mib"}


@dataclass(frozen=True)
class MooncakeAddress:
    """Where the master is, who we are, and where the metadata lives."""

    master: str
    host: str
    buffer_nbytes: int
    redis_url: str = field(repr=False)  # may have a password


def parse_mooncake_url(url: str) -> MooncakeAddress:
    """Raises ``ValueError`` that names the part that is wrong. It shows nothing that may be part of a password."""
    try:
        parts = urlsplit(url)
        host, port = parts.hostname, parts.port
    except ValueError:  # whose words quote the URL
        parts, host, port = urlsplit(""), None, None
    options = parse_qs(parts.query, keep_blank_values=True)
    named = host and not parts.username and not parts.password and not parts.path.strip("/")
    if parts.scheme != "mooncake" or not named or parts.fragment or "redis" not in options:
        raise ValueError("store URL: must be mooncake://MASTER[:port]?redis=PERCENT-ENCODED-REDIS-URL")
    if options.keys() - _OPTIONS:
        raise ValueError(f"store URL: an unknown option; known are {sorted(_OPTIONS)}; percent-encode the redis URL")
    buffer_mib = options.get("buffer_mib", [str(BUFFER_MIB)])[0]
    if not buffer_mib.isdigit() or int(buffer_mib) < 16:
        raise ValueError(f"store URL: buffer_mib {buffer_mib!r} must be a number of at least 16")
    return MooncakeAddress(
        master=f"{host}:{port or MASTER_PORT}",
        host=options.get("host", ["127.0.0.1"])[0],
        buffer_nbytes=int(buffer_mib) * 2**20,
        redis_url=options["redis"][0],
    )


def connect(address: MooncakeAddress, segment_nbytes: int) -> Any:
    """A client that contributes ``segment_nbytes`` of memory (0: none). Raises ``StoreUnavailable``."""
    from mooncake.store import MooncakeDistributedStore

    host, _, port = address.master.rpartition(":")
    try:  # the client's own attempts to reach a master that is not there take a minute and a half
        socket.create_connection((host, int(port)), timeout=CONNECT_TIMEOUT_S).close()
    except OSError as error:
        raise StoreUnavailable(f"mooncake master at {address.master}: {error.strerror or error}") from error
    client = MooncakeDistributedStore()
    code = client.setup(address.host, "P2PHANDSHAKE", segment_nbytes, address.buffer_nbytes, "tcp", "", address.master)
    if code != 0:
        raise StoreUnavailable(f"mooncake master at {address.master}: setup failed with code {code}")
    return client


def pinned_config() -> Any:
    """How entries are put: Mooncake itself must not evict them, because the ledger knows what is leased and pinned."""
    from mooncake.store import ReplicateConfig

    config = ReplicateConfig()
    config.with_hard_pin = True
    return config
