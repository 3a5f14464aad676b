"""A gRPC server (grpc.aio) with health, reflection, TLS and bounds; it does not know which service it carries.

start -> (health NOT_SERVING) -> open -> (SERVING) -> drain -> (NOT_SERVING, running calls end) -> stopped
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, cast

import grpc
from google.protobuf import descriptor_pool, message_factory
from google.protobuf.message import Message
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from serving.rpc.access import Access
from serving.rpc.arrival import Arrival
from serving.rpc.gate import CallGate
from serving.rpc.health import Health
from serving.rpc.metrics import RpcMetrics
from serving.rpc.open_calls import CallLimits
from serving.rpc.parsing import MESSAGE_NBYTES_MAX
from serving.rpc.streams import MessageKinds
from serving.rpc.tls import TlsFiles

PENDING_CALLS_MAX = 8192
CANCEL_S = 1.0  # what cancelled calls get to clean up
HEALTH_NAME = health_pb2.DESCRIPTOR.services_by_name["Health"].full_name

# What one connection can hold open, and how long it may be of no use. The bounds in ``CallLimits`` are narrower where
# they should be; these hold before any code of ours runs.
CONNECTION_OPTIONS = [
    ("grpc.max_concurrent_streams", 1024),
    # Calls that reached grpc and not yet us: beyond its usual 1000 it cuts some off by chance, with no reason given
    # (CANCELLED), and an event loop that is held up for a moment is all it takes. With these, calls are ours to refuse.
    ("grpc.server.max_pending_requests", PENDING_CALLS_MAX),
    ("grpc.server.max_pending_requests_hard_limit", 2 * PENDING_CALLS_MAX),
    ("grpc.server_handshake_timeout_ms", 10_000),
    ("grpc.max_connection_idle_ms", 300_000),
    # Connections are renewed now and then: with it ends what a client that takes nothing has left unread.
    ("grpc.max_connection_age_ms", 3_600_000),
    ("grpc.max_connection_age_grace_ms", 900_000),
    ("grpc.keepalive_time_ms", 30_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.min_ping_interval_without_data_ms", 5_000),
]


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

    def __init__(
        self,
        access: Access,
        service_names: Sequence[str],
        *,
        limits: CallLimits | None = None,
        message_nbytes_max: int = MESSAGE_NBYTES_MAX,
    ) -> None:
        """``service_names`` are the full names (``cairn.v1.PrefillService``) for health and reflection.

        grpc takes no message of more than ``message_nbytes_max`` bytes.
        """
        self._names = tuple(service_names)
        self.metrics = RpcMetrics((*self._names, HEALTH_NAME))
        self.gate = CallGate(access, _message_kinds((*self._names, HEALTH_NAME)), limits)
        self._server = grpc.aio.server(
            interceptors=[Arrival(self.metrics), self.gate],
            options=[
                ("grpc.max_receive_message_length", message_nbytes_max),
                ("grpc.max_send_message_length", MESSAGE_NBYTES_MAX),
                *CONNECTION_OPTIONS,
                ("grpc.so_reuseport", 0),  # a port in use is an error, not a second server
            ],
        )
        self._late = LateHandlers()
        self._server.add_generic_rpc_handlers((self._late,))
        self._health = Health(("", *self._names))
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        reflection.enable_server_reflection((*self._names, HEALTH_NAME, reflection.SERVICE_NAME), self._server)

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
        await self._server.start()
        return bound

    async def open(
        self, add_services: Callable[[grpc.aio.Server], None], message_nbytes_max: int | None = None
    ) -> None:
        """Adds the services, lets calls in and reports SERVING.

        ``add_services`` is given what the generated ``add_...Servicer_to_server`` functions take for a server. From
        here on no message may have more than ``message_nbytes_max`` bytes.
        """
        if message_nbytes_max is not None:
            self.gate.message_nbytes_max = message_nbytes_max
        add_services(cast(grpc.aio.Server, self._late))
        self.gate.open()
        self._health.set(True)

    async def drain(self, deadline_s: float) -> bool:
        """Reports NOT_SERVING, refuses new calls, waits for those that run, stops.

        Calls still running after ``deadline_s`` seconds are cancelled; False if there were any.
        """
        started = time.monotonic()
        self.gate.close()
        self._health.set(False)
        clean = await self.gate.wait_idle(deadline_s)
        # Health watches never end by themselves: what is left now is cancelled.
        await self._server.stop(None)
        if not clean:
            await self.gate.wait_idle(max(CANCEL_S, deadline_s - (time.monotonic() - started)))
        return clean


def _message_kinds(services: Iterable[str]) -> MessageKinds:
    """The request messages of these services, as the generated modules have registered them."""
    found: dict[str, type[Message]] = {}
    for name in services:
        for method in descriptor_pool.Default().FindServiceByName(name).methods:
            found[f"/{name}/{method.name}"] = message_factory.GetMessageClass(method.input_type)
    return MessageKinds(found)
