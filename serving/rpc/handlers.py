"""gRPC handlers of all four kinds as one: their behaviour taken out, and put back in another; the names that services
use of gRPC."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

import grpc

Server: TypeAlias = grpc.aio.Server  # what a service adds its handlers to
Context: TypeAlias = grpc.aio.ServicerContext[Any, Any]  # what a handler knows of its call


def behaviour_of(handler: Any) -> Callable[[Any, Any], Any]:
    """What answers, of whichever kind."""
    kinds = (handler.unary_unary, handler.unary_stream, handler.stream_unary, handler.stream_stream)
    found: Callable[[Any, Any], Any] = next(kind for kind in kinds if kind is not None)
    return found


def with_behaviour(handler: Any, behaviour: Callable[[Any, Any], Any]) -> grpc.RpcMethodHandler[Any, Any]:
    """A handler of the same kind that answers with ``behaviour``."""
    makers: dict[tuple[bool, bool], Any] = {
        (False, False): grpc.unary_unary_rpc_method_handler,
        (False, True): grpc.unary_stream_rpc_method_handler,
        (True, False): grpc.stream_unary_rpc_method_handler,
        (True, True): grpc.stream_stream_rpc_method_handler,
    }
    make = makers[handler.request_streaming, handler.response_streaming]
    made: grpc.RpcMethodHandler[Any, Any] = make(behaviour, handler.request_deserializer, handler.response_serializer)
    return made
