"""Channels, credentials, deadlines and retries: what both clients need from gRPC, and nothing about chunks."""

from __future__ import annotations

import ipaddress
import random
import re
import time
import uuid
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeAlias

import grpc

from cairn.client.errors import CairnError, error_from_status, invalid
from serving.rpc.details import retry_after_s

Tls: TypeAlias = bool | str | Path | None

END: object = grpc.aio.EOF  # type: ignore[attr-defined]  # what read() returns after the last message
MESSAGE_BYTES_MAX = 64 * 2**20
ATTEMPTS_MAX = 4
FIRST_DELAY_S = 0.1
_UNFIT = re.compile(r"[^\x21-\x7e]")  # what cannot stand in metadata


@dataclass(frozen=True)
class Peer:
    """One service at one address, and how to talk to it. ``tls``: None or False is plain text, True trusts the
    system's certificates, a path names a PEM file of certificates to trust."""

    service: str
    address: str
    tls: Tls = None
    token: str | None = None
    request_id: str = ""

    def for_request(self, request_id: str = "") -> Peer:
        """The same for one request. Its id, a new one for "", stands in the logs of both services and in errors."""
        return replace(self, request_id=request_id or uuid.uuid4().hex)

    @property
    def source(self) -> str:
        return f"{self.service} service at {self.address}"

    @property
    def metadata(self) -> tuple[tuple[str, str], ...]:
        named = (("x-request-id", _UNFIT.sub("_", self.request_id)),) if self.request_id else ()
        return (("authorization", f"Bearer {self.token}"), *named) if self.token else named

    def open_channel(self) -> grpc.Channel:
        """A channel for threads. Connects on the first call."""
        credentials = self._credentials()
        if credentials is None:
            return grpc.insecure_channel(self.address, options=self._options())
        return grpc.secure_channel(self.address, credentials, options=self._options())

    def open_async_channel(self) -> grpc.aio.Channel:
        """A channel of the running event loop. Connects on the first call."""
        credentials = self._credentials()
        if credentials is None:
            return grpc.aio.insecure_channel(self.address, options=self._options())
        return grpc.aio.secure_channel(self.address, credentials, options=self._options())

    def _credentials(self) -> grpc.ChannelCredentials | None:
        if not self.tls:
            return None
        if self.tls is True:
            return grpc.ssl_channel_credentials()
        try:
            return grpc.ssl_channel_credentials(Path(self.tls).read_bytes())
        except OSError as error:
            raise invalid("tls", f"cannot read {self.tls}: {error.strerror}") from error

    def _options(self) -> list[tuple[str, Any]]:
        options: list[tuple[str, Any]] = [
            ("grpc.max_receive_message_length", MESSAGE_BYTES_MAX),
            # A refused connection is tried again as soon as a retry of ours wants it, not after a second.
            ("grpc.initial_reconnect_backoff_ms", int(FIRST_DELAY_S * 1000)),
            ("grpc.max_reconnect_backoff_ms", 2000),
            ("grpc.use_local_subchannel_pool", 1),
            # A peer that vanished without a word is noticed while a call runs.
            ("grpc.keepalive_time_ms", 30_000),
            ("grpc.keepalive_timeout_ms", 10_000),
            ("grpc.http2.ping_timeout_ms", 10_000),
        ]
        if is_loopback(self.address):
            options.append(("grpc.enable_http_proxy", 0))
        return options


@dataclass
class Attempts:
    """The deadline and the retries of one call; both clients ask it what to do next."""

    timeout_s: float
    retry: bool

    def __post_init__(self) -> None:
        if not self.timeout_s > 0:
            raise invalid("timeout_s", f"must be positive, not {self.timeout_s}")
        self._ends_at = time.monotonic() + self.timeout_s
        self._failed = 0

    def remaining_s(self) -> float:
        """Seconds until the deadline; never quite 0, so that gRPC reports the deadline itself."""
        return max(0.001, self._ends_at - time.monotonic())

    def delay_after(self, error: grpc.RpcError) -> float | None:
        """Seconds to wait before the next attempt, or None to give up.

        UNAVAILABLE is tried again, and RESOURCE_EXHAUSTED from a service that says when (``RetryInfo``): a few
        times, with a random delay that doubles and is no shorter than the service asks, never past the deadline.
        """
        self._failed += 1
        asked_s = retry_after_s(error.trailing_metadata())
        overloaded = error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED and asked_s is not None
        again = overloaded or error.code() is grpc.StatusCode.UNAVAILABLE
        if not self.retry or not again or self._failed >= ATTEMPTS_MAX:
            return None
        delay_s = max(FIRST_DELAY_S * 2 ** (self._failed - 1), asked_s or 0.0) * random.uniform(1.0, 1.5)
        return delay_s if delay_s < self.remaining_s() else None


def error_from_rpc(error: grpc.RpcError, peer: Peer) -> CairnError:
    """What a failed RPC means to the caller."""
    failed = error_from_status(error.code().name, error.details() or "", peer.source, peer.request_id)
    failed.retry_after_s = retry_after_s(error.trailing_metadata())
    return failed


def is_loopback(address: str) -> bool:
    """Whether ``HOST:PORT`` is on this machine."""
    host = address.rpartition(":")[0].strip("[]")
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
