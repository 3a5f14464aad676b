"""A handler of each kind: its behaviour taken out and put back."""

from __future__ import annotations

from typing import Any

import grpc
import pytest

from serving.rpc.handlers import behaviour_of, with_behaviour

MAKERS: list[Any] = [
    grpc.unary_unary_rpc_method_handler,
    grpc.unary_stream_rpc_method_handler,
    grpc.stream_unary_rpc_method_handler,
    grpc.stream_stream_rpc_method_handler,
]


@pytest.mark.parametrize("make", MAKERS)
def test_another_behaviour_in_the_same_kind_of_handler(make: Any) -> None:
    def old(request: Any, context: Any) -> str:
        return "old"

    def new(request: Any, context: Any) -> str:
        return "new"

    handler = make(old, bytes.upper, bytes.lower)
    assert behaviour_of(handler) is old
    other = with_behaviour(handler, new)
    assert behaviour_of(other) is new
    for kept in ("request_streaming", "response_streaming", "request_deserializer", "response_serializer"):
        assert getattr(other, kept) == getattr(handler, kept)
