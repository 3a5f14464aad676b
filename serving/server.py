"""A gRPC server (grpc.aio) with health, reflection, TLS and bounds; it does not know which service it carries.

start -> (health NOT_SERVING) -> open -> (SERVING) -> drain -> (NOT_SERVING, running calls end) -> stopped
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from serving.access import Access
from serving.arrival import Arrival
from serving.calls import CallGate
from serving.rpc_metrics import RpcMetrics

MESSAGE_NBYTES_MAX = 16 * 1024 * 1024
CALLS_MAX = 1024  # at once, health checks among them; more are answered RESOURCE_EXHAUSTED
CANCEL_S = 1.0  # what cancelled calls get to clean up

_SERVING = health_pb2.HealthCheckResponse.SERVING
_NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING


@dataclass(frozen=True)
class TlsFiles:
    """PEM files of the server's certificate chain and private key."""

    cert: Path
    key: Path

    def credentials(self) -> grpc.ServerCredentials:
        """Reads the files. Raises ``OSError``."""
        return grpc.ssl_server_credentials([(self.key.read_bytes(), self.cert.read_bytes())])


class LateHandlers(grpc.GenericRpcHandler):  # type: ignore[type-arg]  # generic in the stubs only
    """Handlers that come after the server has started (a model loads meanwhile); grpc takes none itself then."""

    def __init__(self) -> None:
        self._handlers: list[grpc.GenericRpcHandler[Any, Any]] = []

    def add_generic_rpc_handlers(self, handlers: Iterable[grpc.GenericRpcHandler[Any, Any]]) -> None:
        self._handlers.extend(handlers)

    def add_registered_method_handlers(self, service_name: str, method_handlers: Mapping[str, Any]) -> None:
        """A shortcut past the generic handlers for servers that have not started: nothing to do here."""

    def service(self, handler_call_details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler[Any, Any] | None:
        found = (handler.service(handler_call_details) for handler in self._handlers)
        return next((handler for handler in found if handler is not None), None)


class RpcServer:
    """Made inside the event loop that it serves in."""

    def __init__(self, access: Access, service_names: Sequence[str], *, calls_max: int = CALLS_MAX) -> None:
        """``service_names`` are the full names (``cairn.v1.PrefillService``) for health and reflection."""
        self.gate = CallGate(access)
        self.metrics = RpcMetrics((*service_names, health.SERVICE_NAME))
        self._names = tuple(service_names)
        self._server = grpc.aio.server(
            interceptors=[Arrival(self.metrics), self.gate],
            maximum_concurrent_rpcs=calls_max,
            options=[
                ("grpc.max_receive_message_length", MESSAGE_NBYTES_MAX),
                ("grpc.max_send_message_length", MESSAGE_NBYTES_MAX),
                ("grpc.keepalive_time_ms", 30_000),
                ("grpc.keepalive_timeout_ms", 10_000),
                ("grpc.keepalive_permit_without_calls", 1),
                ("grpc.http2.min_ping_interval_without_data_ms", 5_000),
                ("grpc.so_reuseport", 0),  # a port in use is an error, not a second server
            ],
        )
        self._late = LateHandlers()
        self._server.add_generic_rpc_handlers((self._late,))
        self._health = health.aio.HealthServicer()  # type: ignore[attr-defined]
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        reflection.enable_server_reflection((*self._names, health.SERVICE_NAME, reflection.SERVICE_NAME), self._server)

    async def start(self, host: str, port: int, tls: TlsFiles | None = None) -> int:
        """Listens, with every call refused until ``open``; returns the port (a free one for 0).

        Raises ``OSError`` if the address cannot be bound or a TLS file not be read.
        """
        address = f"{host}:{port}"
        try:
            if tls is None:
                bound = self._server.add_insecure_port(address)
            else:
                bound = self._server.add_secure_port(address, tls.credentials())
        except RuntimeError as error:
            raise OSError(f"cannot listen on {address}: {error}; is the port in use?") from error
        await self._set_health(_NOT_SERVING)
        await self._server.start()
        return bound

    async def open(self, add_services: Callable[[LateHandlers], None]) -> None:
        """Adds the services, lets calls in and reports SERVING.

        ``add_services`` is given what the generated ``add_...Servicer_to_server`` functions take for a server.
        """
        add_services(self._late)
        self.gate.open()
        await self._set_health(_SERVING)

    async def drain(self, deadline_s: float) -> bool:
        """Reports NOT_SERVING, refuses new calls, waits for those that run, stops.

        Calls still running after ``deadline_s`` seconds are cancelled; False if there were any.
        """
        started = time.monotonic()
        self.gate.close()
        await self._health.enter_graceful_shutdown()
        clean = await self.gate.wait_idle(deadline_s)
        # Health watches never end by themselves: what is left now is cancelled.
        await self._server.stop(None)
        if not clean:
            await self.gate.wait_idle(max(CANCEL_S, deadline_s - (time.monotonic() - started)))
        return clean

    async def _set_health(self, status: health_pb2.HealthCheckResponse.ServingStatus.ValueType) -> None:
        for name in ("", *self._names):
            await self._health.set(name, status)
