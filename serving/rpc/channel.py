"""Channels to our services: TLS, keepalive, reconnecting and sizes of messages, set up here for whoever calls one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import grpc

from serving.rpc.addresses import host_and_port, is_loopback
from serving.trace.request_id import clean_request_id

# None or False: plain text. True: the system's certificates are trusted. Bytes: these are, in PEM.
Trust: TypeAlias = bytes | bool | None

MESSAGE_NBYTES_MAX = 64 * 2**20
TOKEN_KEY, REQUEST_ID_KEY = "authorization", "x-request-id"
RECONNECT_MS_MIN, RECONNECT_MS_MAX = 100, 1000  # a refused connection is tried again as soon as somebody wants it


@dataclass(frozen=True)
class Target:
    """A service, or several by gRPC's own name resolution, and how to talk to it.

    A connection whose peer answers no ping for ``keepalive_timeout_s`` is given up; one is sent after ``keepalive_s``
    seconds without a word, while a call runs.
    """

    address: str
    trust: Trust = None
    keepalive_s: float = 30.0
    keepalive_timeout_s: float = 10.0
    options: Sequence[tuple[str, Any]] = ()  # gRPC's, beside those of every channel

    def open(self) -> grpc.Channel:
        """A channel for threads. Connects on the first call."""
        credentials = self._credentials()
        if credentials is None:
            return grpc.insecure_channel(self.address, options=self._options())
        return grpc.secure_channel(self.address, credentials, options=self._options())

    def open_async(self) -> grpc.aio.Channel:
        """A channel of the running event loop. Connects on the first call."""
        credentials = self._credentials()
        if credentials is None:
            return grpc.aio.insecure_channel(self.address, options=self._options())
        return grpc.aio.secure_channel(self.address, credentials, options=self._options())

    def _credentials(self) -> grpc.ChannelCredentials | None:
        if isinstance(self.trust, bytes):
            return grpc.ssl_channel_credentials(self.trust)
        return grpc.ssl_channel_credentials() if self.trust else None

    def _options(self) -> list[tuple[str, Any]]:
        timeout_ms = int(self.keepalive_timeout_s * 1000)
        return [
            ("grpc.max_receive_message_length", MESSAGE_NBYTES_MAX),
            ("grpc.max_send_message_length", MESSAGE_NBYTES_MAX),
            ("grpc.initial_reconnect_backoff_ms", RECONNECT_MS_MIN),
            ("grpc.max_reconnect_backoff_ms", RECONNECT_MS_MAX),
            ("grpc.use_local_subchannel_pool", 1),
            ("grpc.keepalive_time_ms", int(self.keepalive_s * 1000)),
            ("grpc.keepalive_timeout_ms", timeout_ms),
            ("grpc.http2.ping_timeout_ms", timeout_ms),  # what this gRPC goes by; its default is 60 s
            ("grpc.http2.max_pings_without_data", 0),
            ("grpc.enable_http_proxy", int(not is_loopback(host_and_port(self.address)[0]))),
            *self.options,
        ]


def call_metadata(token: str | None, request_id: str) -> tuple[tuple[str, str], ...]:
    """Who calls, and for which request; what is not known is left out."""
    known = ((TOKEN_KEY, f"Bearer {token}" if token else ""), (REQUEST_ID_KEY, clean_request_id(request_id)))
    return tuple((key, value) for key, value in known if value)
