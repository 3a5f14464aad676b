"""Whether a service serves (grpc.health.v1): its status, or the gRPC code that the question ended with, and why."""

from __future__ import annotations

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from cairn.client.transport import Peer


def ask_health(channel: grpc.Channel, peer: Peer, timeout_s: float) -> tuple[str, str]:
    """``SERVING`` or ``NOT_SERVING``, or a code's name with its message."""
    stub = health_pb2_grpc.HealthStub(channel)
    try:
        reply = stub.Check(health_pb2.HealthCheckRequest(), timeout=timeout_s, metadata=peer.metadata)
    except grpc.RpcError as error:
        return error.code().name, error.details() or ""
    return _name(reply), ""


async def ask_health_async(channel: grpc.aio.Channel, peer: Peer, timeout_s: float) -> tuple[str, str]:
    """``ask_health`` on a channel of the running event loop."""
    stub = health_pb2_grpc.HealthStub(channel)
    try:
        reply = await stub.Check(health_pb2.HealthCheckRequest(), timeout=timeout_s, metadata=peer.metadata)
    except grpc.RpcError as error:
        return error.code().name, error.details() or ""
    return _name(reply), ""


def _name(reply: health_pb2.HealthCheckResponse) -> str:
    return str(health_pb2.HealthCheckResponse.ServingStatus.Name(reply.status))
