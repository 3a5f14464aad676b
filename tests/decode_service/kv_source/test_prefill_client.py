"""Asking a prefill service for KV, over a server that answers as it is told: what is tried again, and what is said."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc
import pytest

from decode_service.kv_source.fetcher import FetchTerms
from decode_service.kv_source.prefill_client import RemotePrefillClient
from decode_service.prompt.request_chunk import Unpublished
from protos import chunks_pb2, prefill_pb2, prefill_pb2_grpc
from serving.errors import (
    STORE_FULL,
    STORE_UNAVAILABLE,
    Cancelled,
    Conflict,
    InternalFault,
    InvalidRequest,
    NotFound,
    Overloaded,
    RequestError,
    Unavailable,
    Unsupported,
)
from serving.rpc.errors import error_metadata, status_of
from serving.trace.request_id import bearing
from tests.decode_service.prompts import composed

COMPOSITION = composed((1, 2), (3, 4, 5))
KEY = COMPOSITION.chunks[1].key


class Peer(prefill_pb2_grpc.PrefillServiceServicer):
    """Fails with each of ``errors`` in turn, then answers; waits while it is not ``free``."""

    def __init__(self) -> None:
        self.errors: list[RequestError] = []
        self.requests: list[prefill_pb2.PrefillChunkRequest] = []
        self.metadata: dict[str, Any] = {}
        self.free = threading.Event()
        self.free.set()

    def PrefillChunk(self, request: Any, context: Any) -> prefill_pb2.PrefillChunkResponse:
        self.requests.append(request)
        self.metadata = dict(context.invocation_metadata())
        self.free.wait(30)
        if self.errors:
            error = self.errors.pop(0)
            context.set_trailing_metadata(error_metadata(error))
            context.abort(status_of(error), error.message)
        return prefill_pb2.PrefillChunkResponse(key=KEY)


@pytest.fixture
def peer() -> Iterator[Peer]:
    yield (made := Peer())  # type: ignore[abstract]  # the rest is as generated: UNIMPLEMENTED
    made.free.set()


@pytest.fixture
def address(peer: Peer) -> Iterator[str]:
    server = grpc.server(ThreadPoolExecutor(4))
    prefill_pb2_grpc.add_PrefillServiceServicer_to_server(peer, server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    yield f"127.0.0.1:{port}"
    peer.free.set()
    server.stop(None)


@pytest.fixture
def prefill_client(address: str) -> Iterator[RemotePrefillClient]:
    made = RemotePrefillClient(address, token="word")
    yield made
    made.close()


def caller(seconds: float = math.inf, abandoned: Callable[[], bool] = lambda: False) -> FetchTerms:
    return FetchTerms("salty", time.monotonic() + seconds, abandoned)


def test_the_chunk_is_asked_for_behind_its_context_as_its_caller(
    peer: Peer, prefill_client: RemotePrefillClient
) -> None:
    with bearing("mine"):
        asked = prefill_client.compute(COMPOSITION, 1, caller())
    assert asked == KEY
    first, second = (chunk.segment.chunk_id for chunk in COMPOSITION.chunks)
    (request,) = peer.requests
    assert (request.chunk_id, list(request.context_chunk_ids), request.salt) == (second, [first], "salty")
    assert request.reuse_mode == chunks_pb2.REUSE_MODE_EXACT
    assert (peer.metadata["authorization"], peer.metadata["x-request-id"]) == ("Bearer word", "mine")


@pytest.mark.parametrize(
    ("reason", "why"),
    [(STORE_FULL, Unpublished.STORE_FULL), (STORE_UNAVAILABLE, Unpublished.STORE_UNAVAILABLE)],
)
def test_a_store_that_takes_nothing_is_no_failure(
    peer: Peer, prefill_client: RemotePrefillClient, reason: str, why: Unpublished
) -> None:
    peer.errors = [Unavailable("store", reason=reason)]
    assert prefill_client.compute(COMPOSITION, 1, caller()) is why and len(peer.requests) == 1


@pytest.mark.parametrize(
    "error", [Unavailable("draining"), Cancelled("cut off"), Overloaded("full", retry_after_s=0.01)]
)
def test_what_may_pass_is_asked_again(peer: Peer, prefill_client: RemotePrefillClient, error: RequestError) -> None:
    peer.errors = [error, error]
    assert prefill_client.compute(COMPOSITION, 1, caller()) == KEY and len(peer.requests) == 3


@pytest.mark.parametrize("kind", [InvalidRequest, NotFound, Conflict, Unsupported, Overloaded, InternalFault])
def test_what_would_not_is_told_at_once(
    peer: Peer, prefill_client: RemotePrefillClient, kind: type[RequestError]
) -> None:
    peer.errors = [kind("so", field="chunk_id")]
    with pytest.raises(kind) as caught:
        prefill_client.compute(COMPOSITION, 1, caller())
    assert caught.value.message == f"prefill service {prefill_client.target}: chunk_id: so" and len(peer.requests) == 1


def test_it_gives_up_before_its_caller_does(peer: Peer, prefill_client: RemotePrefillClient) -> None:
    peer.errors = [Unavailable("draining")] * 100
    with pytest.raises(Unavailable, match=r"was not there for . s: draining"):
        prefill_client.compute(COMPOSITION, 1, caller(1.0))
    peer.errors = [Overloaded("full", retry_after_s=60.0)]
    with pytest.raises(Overloaded, match="full"):
        prefill_client.compute(COMPOSITION, 1, caller(5.0))


def test_a_peer_that_hangs_is_asked_twice(peer: Peer, address: str) -> None:
    peer.free.clear()
    prefill_client = RemotePrefillClient(address, call_s=0.2, call_s_a_token=0.0)
    with pytest.raises(Unavailable, match="did not answer"):
        prefill_client.compute(COMPOSITION, 1, caller())
    assert len(peer.requests) == 2
    prefill_client.close()


def test_nobody_waits_any_more(peer: Peer, prefill_client: RemotePrefillClient) -> None:
    peer.free.clear()
    with pytest.raises(Cancelled):
        prefill_client.compute(COMPOSITION, 1, caller(abandoned=lambda: bool(peer.requests)))


def test_a_client_that_is_closed_says_so(prefill_client: RemotePrefillClient) -> None:
    prefill_client.close()
    with pytest.raises(Unavailable, match="shutting down"):
        prefill_client.compute(COMPOSITION, 1, caller())
