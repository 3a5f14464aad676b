"""Channels, credentials, deadlines and retries: what both clients need from gRPC, and nothing about chunks."""

from __future__ import annotations

import random
import time
import uuid
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeAlias

import grpc

from cairn.client.errors import CairnError, error_from_status, invalid
from serving.rpc.channel import Target, call_metadata
from serving.rpc.details import retry_after_s

Tls: TypeAlias = bool | str | Path | None
AsyncChannel: TypeAlias = grpc.aio.Channel
CallFailed: TypeAlias = grpc.RpcError  # what a call of either kind of channel raises

END: object = grpc.aio.EOF  # type: ignore[attr-defined]  # what read() returns after the last message
ATTEMPTS_MAX = 4
FIRST_DELAY_S = 0.1


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
        return call_metadata(self.token, self.request_id)

    def open_channel(self) -> grpc.Channel:
        """A channel for threads. Connects on the first call."""
        return self._target().open()

    def open_async_channel(self) -> AsyncChannel:
        """A channel of the running event loop. Connects on the first call."""
        return self._target().open_async()

    def _target(self) -> Target:
        if self.tls is None or isinstance(self.tls, bool):
            return Target(self.address, self.tls)
        try:
            return Target(self.address, Path(self.tls).read_bytes())
        except OSError as error:
            raise invalid("tls", f"cannot read {self.tls}: {error.strerror}") from error


@dataclass
class Attempts:
    """The deadline and the retries of one call; both clients ask it what to do next.

    Without ``wait_overloaded`` a service that is full is not asked again: its caller is told when to come.
    """

    timeout_s: float
    retry: bool
    wait_overloaded: bool = True

    def __post_init__(self) -> None:
        if not self.timeout_s > 0:
            raise invalid("timeout_s", f"must be positive, not {self.timeout_s}")
        self._ends_at = time.monotonic() + self.timeout_s
        self._failed = 0

    def remaining_s(self) -> float:
        """Seconds until the deadline; never quite 0, so that gRPC reports the deadline itself."""
        return max(0.001, self._ends_at - time.monotonic())

    def delay_after(self, error: CallFailed) -> float | None:
        """Seconds to wait before the next attempt, or None to give up.

        UNAVAILABLE is tried again, and RESOURCE_EXHAUSTED from a service that says when (``RetryInfo``): a few
        times, with a random delay that doubles and is no shorter than the service asks, never past the deadline.
        """
        self._failed += 1
        asked_s = retry_after_s(error.trailing_metadata())
        full = error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED and asked_s is not None
        overloaded = full and self.wait_overloaded
        again = overloaded or error.code() is grpc.StatusCode.UNAVAILABLE
        if not self.retry or not again or self._failed >= ATTEMPTS_MAX:
            return None
        delay_s = max(FIRST_DELAY_S * 2 ** (self._failed - 1), asked_s or 0.0) * random.uniform(1.0, 1.5)
        return delay_s if delay_s < self.remaining_s() else None


def error_from_rpc(error: CallFailed, peer: Peer) -> CairnError:
    """What a failed RPC means to the caller."""
    failed = error_from_status(error.code().name, error.details() or "", peer.source, peer.request_id)
    failed.retry_after_s = retry_after_s(error.trailing_metadata())
    return failed


def chunk_is_gone(error: CallFailed) -> bool:
    """Whether a request failed because it names a chunk that is not registered (any more)."""
    return error.code() is grpc.StatusCode.NOT_FOUND


def is_away(error: CallFailed) -> bool:
    """Whether nothing is served there (any more): unreachable, starting, shutting down. Calls that run when the time to
    drain is over end with CANCELLED."""
    return error.code() in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED)


def is_late(error: CallFailed) -> bool:
    """Whether the call's deadline passed."""
    return error.code() is grpc.StatusCode.DEADLINE_EXCEEDED


def goes_elsewhere(error: CallFailed) -> bool:
    """Whether another replica may take what this one did not: it is away, or full and says when it will not be."""
    full = error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED and retry_after_s(error.trailing_metadata()) is not None
    return full or is_away(error)


def outcome(call: Any) -> Any:
    """The reply of a call that was begun as a future, or the ``CallFailed`` that it ended with."""
    try:
        return call.exception() or call.result()
    except grpc.FutureCancelledError:
        return call
