"""Asking a prefill service for KV, over a server that answers as it is told: what is tried again, and what is said."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import grpc
import pytest

from decode_service.kv_source.asking import ComputedChunk, FetchTerms
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

COMPOSITION = composed((1, 2), (3, 4, 5), (6,))
MADE = [ComputedChunk(index, COMPOSITION.chunks[index].key) for index in range(3)]


class Peer(prefill_pb2_grpc.PrefillServiceServicer):
    """Answers for ``before`` chunks, then fails with each of ``errors`` in turn, then answers for the rest; waits while
    it is not ``free``."""

    def __init__(self) -> None:
        self.errors: list[RequestError] = []
        self.before = 0
        self.otherwise: list[prefill_pb2.PrefillCompositionResponse] | None = None
        self.requests: list[prefill_pb2.PrefillCompositionRequest] = []
        self.metadata: dict[str, Any] = {}
        self.free = threading.Event()
        self.free.set()

    def PrefillComposition(self, request: Any, context: Any) -> Iterator[prefill_pb2.PrefillCompositionResponse]:
        self.requests.append(request)
        self.metadata = dict(context.invocation_metadata())
        if self.otherwise is not None:
            yield from self.otherwise
            return
        for number, index in enumerate(request.wanted):
            if number == self.before:
                self._fail(context)
            yield prefill_pb2.PrefillCompositionResponse(index=index, key=MADE[index].key, durable=True)

    def _fail(self, context: Any) -> None:
        self.free.wait(30)
        if self.errors:
            error = self.errors.pop(0)
            context.set_trailing_metadata(error_metadata(error))
            context.abort(status_of(error), error.message)


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


def test_chunks_are_asked_for_in_one_call_as_their_caller(peer: Peer, prefill_client: RemotePrefillClient) -> None:
    with bearing("mine"):
        assert list(prefill_client.compute_all(COMPOSITION, [0, 1], caller())) == MADE[:2]
    (request,) = peer.requests
    assert list(request.chunk_ids) == [chunk.segment.chunk_id for chunk in COMPOSITION.chunks[:2]]
    assert (list(request.wanted), request.salt, request.durable) == ([0, 1], "salty", True)
    assert request.reuse_mode == chunks_pb2.REUSE_MODE_EXACT
    assert (peer.metadata["authorization"], peer.metadata["x-request-id"]) == ("Bearer word", "mine")


def test_each_chunk_is_told_of_while_others_are_made(peer: Peer, prefill_client: RemotePrefillClient) -> None:
    peer.before = 1
    peer.free.clear()
    made = prefill_client.compute_all(COMPOSITION, [0, 1, 2], caller())
    assert next(made) == MADE[0]
    peer.free.set()
    assert list(made) == MADE[1:]


@pytest.mark.parametrize("before", [0, 1])
@pytest.mark.parametrize(
    ("reason", "why"),
    [(STORE_FULL, Unpublished.STORE_FULL), (STORE_UNAVAILABLE, Unpublished.STORE_UNAVAILABLE)],
)
def test_a_store_that_takes_nothing_is_no_failure(
    peer: Peer, prefill_client: RemotePrefillClient, reason: str, why: Unpublished, before: int
) -> None:
    peer.errors, peer.before = [Unavailable("store", reason=reason)], before
    left = [replace(made, durable=False, unpublished=why) for made in MADE[before:]]
    assert list(prefill_client.compute_all(COMPOSITION, [0, 1, 2], caller())) == [*MADE[:before], *left]
    assert len(peer.requests) == 1


@pytest.mark.parametrize(
    "error", [Unavailable("draining"), Cancelled("cut off"), Overloaded("full", retry_after_s=0.01)]
)
def test_what_may_pass_is_asked_again_for_what_is_left(
    peer: Peer, prefill_client: RemotePrefillClient, error: RequestError
) -> None:
    peer.errors, peer.before = [error, error], 1
    assert list(prefill_client.compute_all(COMPOSITION, [0, 1, 2], caller())) == MADE
    assert [list(request.wanted) for request in peer.requests] == [[0, 1, 2], [1, 2], [2]]


@pytest.mark.parametrize("kind", [InvalidRequest, NotFound, Conflict, Unsupported, Overloaded, InternalFault])
def test_what_would_not_is_told_at_once(
    peer: Peer, prefill_client: RemotePrefillClient, kind: type[RequestError]
) -> None:
    peer.errors = [kind("so", field="chunk_ids")]
    with pytest.raises(kind) as caught:
        list(prefill_client.compute_all(COMPOSITION, [1], caller()))
    assert caught.value.message == f"prefill service {prefill_client.target}: chunk_ids: so" and len(peer.requests) == 1


@pytest.mark.parametrize("reply", [{"index": 1}, {"index": 0, "unpublished": 9}, {}])
def test_a_peer_that_answers_otherwise_is_not_believed(
    peer: Peer, prefill_client: RemotePrefillClient, reply: dict[str, Any]
) -> None:
    peer.otherwise = [prefill_pb2.PrefillCompositionResponse(**reply)] if reply else []
    with pytest.raises(InternalFault, match="did not answer for what it was asked"):
        list(prefill_client.compute_all(COMPOSITION, [0], caller()))


def test_it_gives_up_before_its_caller_does(peer: Peer, prefill_client: RemotePrefillClient) -> None:
    peer.errors = [Unavailable("draining")] * 100
    with pytest.raises(Unavailable, match=r"was not there for . s: draining"):
        list(prefill_client.compute_all(COMPOSITION, [1], caller(1.0)))
    peer.errors = [Overloaded("full", retry_after_s=60.0)]
    with pytest.raises(Overloaded, match="full"):
        list(prefill_client.compute_all(COMPOSITION, [1], caller(5.0)))


def test_a_peer_that_hangs_is_asked_twice(peer: Peer, address: str) -> None:
    peer.free.clear()
    prefill_client = RemotePrefillClient(address, call_s=0.2, call_s_a_token=0.0)
    with pytest.raises(Unavailable, match="did not answer"):
        list(prefill_client.compute_all(COMPOSITION, [1], caller()))
    assert len(peer.requests) == 2
    prefill_client.close()


def test_nobody_waits_any_more(peer: Peer, prefill_client: RemotePrefillClient) -> None:
    peer.free.clear()
    with pytest.raises(Cancelled):
        list(prefill_client.compute_all(COMPOSITION, [1], caller(abandoned=lambda: bool(peer.requests))))


def test_a_client_that_is_closed_says_so(prefill_client: RemotePrefillClient) -> None:
    prefill_client.close()
    with pytest.raises(Unavailable, match="shutting down"):
        list(prefill_client.compute_all(COMPOSITION, [1], caller()))
