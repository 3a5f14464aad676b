"""Asks the prefill service for KV that is missing, over gRPC, from a loader thread."""

from __future__ import annotations

import time

import grpc

from chunk_store.key import ChunkKey
from decode_service.kv_source.store_source import Asked, Caller, FetchFailed
from decode_service.prompt.composition import Composition
from decode_service.sequence import Unpublished
from protos import prefill_pb2, prefill_pb2_grpc
from serving.process.logs import current_request_id
from serving.rpc.arrival import REQUEST_ID_KEY
from serving.rpc.details import error_reason, retry_after_s
from serving.rpc.errors import STORE_FULL, STORE_UNAVAILABLE
from serving.rpc.parsing import MESSAGE_NBYTES_MAX
from serving.rpc.wire import reuse_mode_out

RETRY_S = 0.25
# A call gets as long as the slowest device worth having takes for its tokens, behind as many again of others.
CALL_S, CALL_S_A_TOKEN = 60.0, 0.1
HUNG_CALLS_MAX = 2  # calls that run out of that time before the request is given up; the next goes to another peer
MARGIN_S, MARGIN_SHARE = 0.5, 0.1  # before the caller's deadline, to tell it why; of short ones a tenth
# A connection whose peer answers no ping is given up; a service that allows no pings this frequent ends it itself.
KEEPALIVE_S, KEEPALIVE_TIMEOUT_S = 10.0, 5.0
# A service that goes away ends calls with UNAVAILABLE, or with CANCELLED when its time to drain is over.
_AWAY = (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED)
_UNPUBLISHED = {STORE_FULL: Unpublished.STORE_FULL, STORE_UNAVAILABLE: Unpublished.STORE_UNAVAILABLE}


class RemotePrefiller:
    """One channel to a prefill service (or several, by gRPC's own name resolution and balancing).

    A service that goes away is tried again until the caller's deadline: one that starts anew may have a large model to
    load. A call gets ``call_s`` and ``call_s_a_token`` for each token that may have to be computed; one that runs out
    of it is made once more, on the next peer where there are several.
    """

    def __init__(
        self,
        target: str,
        *,
        call_s: float = CALL_S,
        call_s_a_token: float = CALL_S_A_TOKEN,
        keepalive_s: float = KEEPALIVE_S,
        keepalive_timeout_s: float = KEEPALIVE_TIMEOUT_S,
        token: str = "",
        ca: bytes | None = None,
    ) -> None:
        self.target = target
        self._call_s = call_s
        self._call_s_a_token = call_s_a_token
        self._metadata = (("authorization", f"Bearer {token}"),) if token else ()
        options = (
            ("grpc.max_receive_message_length", MESSAGE_NBYTES_MAX),
            ("grpc.max_send_message_length", MESSAGE_NBYTES_MAX),
            ("grpc.lb_policy_name", "round_robin"),
            ("grpc.max_reconnect_backoff_ms", 1000),
            ("grpc.keepalive_time_ms", int(keepalive_s * 1000)),
            ("grpc.keepalive_timeout_ms", int(keepalive_timeout_s * 1000)),
            (
                "grpc.http2.ping_timeout_ms",
                int(keepalive_timeout_s * 1000),
            ),  # what this gRPC goes by; its default is 60 s
            ("grpc.http2.max_pings_without_data", 0),
        )
        if ca is None:
            self._channel = grpc.insecure_channel(target, options)
        else:
            self._channel = grpc.secure_channel(target, grpc.ssl_channel_credentials(ca), options)
        self._stub = prefill_pb2_grpc.PrefillServiceStub(self._channel)

    def compute(self, composition: Composition, index: int, caller: Caller) -> Asked:
        """Makes the KV of chunk ``index``, and of its context, exist in the store. Raises ``FetchFailed``."""
        request = prefill_pb2.PrefillChunkRequest(
            chunk_id=composition.parts[index].chunk_id,
            context_chunk_ids=[part.chunk_id for part in composition.parts[:index]],
            reuse_mode=reuse_mode_out(composition.mode),
            salt=caller.salt,
        )
        chunks = (composition.chunks[i] for i in (*composition.chunks[index].context, index))
        work_s = self._call_s + self._call_s_a_token * sum(len(chunk.token_ids) for chunk in chunks)
        hung, asked_at = 0, time.monotonic()
        margin_s = min(MARGIN_S, MARGIN_SHARE * (caller.deadline - asked_at))
        while True:
            left_s = max(0.0, caller.deadline - time.monotonic())
            try:
                return Asked(ChunkKey(self._call(request, min(work_s, left_s), caller).key))
            except grpc.RpcError as error:
                unpublished = _UNPUBLISHED.get(error_reason(error.trailing_metadata()))
                if unpublished is not None:
                    return Asked(composition.chunks[index].key, unpublished)
                hung += error.code() is grpc.StatusCode.DEADLINE_EXCEEDED
                pause_s = self._pause_s(error, hung)
                now = time.monotonic()
                out_of_time = now + pause_s >= caller.deadline - margin_s
                if out_of_time or caller.abandoned() or hung >= HUNG_CALLS_MAX:
                    raise self._gave_up(error, now - asked_at) from error
            time.sleep(pause_s)

    def _pause_s(self, error: grpc.RpcError, hung: int) -> float:
        """Seconds until the next attempt. Raises ``FetchFailed`` where another one would fare no better."""
        if error.code() in _AWAY:
            return RETRY_S
        if error.code() is grpc.StatusCode.DEADLINE_EXCEEDED:
            return 0.0
        busy_s = retry_after_s(error.trailing_metadata())
        if error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED and busy_s is not None:
            return max(RETRY_S, busy_s)
        raise FetchFailed(error.code().name, f"prefill service {self.target}: {error.details()}") from error

    def _gave_up(self, error: grpc.RpcError, after_s: float) -> FetchFailed:
        """What a request ends with that has no more time, or has met a peer that hangs."""
        if error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED:
            return FetchFailed(error.code().name, f"prefill service {self.target}: {error.details()}")
        was = "did not answer" if error.code() is grpc.StatusCode.DEADLINE_EXCEEDED else "was not there"
        message = f"prefill service {self.target} {was} for {after_s:.0f} s: {error.details()}"
        return FetchFailed("UNAVAILABLE", message)

    def _call(
        self, request: prefill_pb2.PrefillChunkRequest, timeout_s: float, caller: Caller
    ) -> prefill_pb2.PrefillChunkResponse:
        """One call, cancelled when nobody waits for it any more. Raises ``RpcError`` or ``FetchFailed``."""
        metadata = (*self._metadata, (REQUEST_ID_KEY, current_request_id()))
        call = self._stub.PrefillChunk.future(request, timeout=timeout_s, metadata=metadata)
        while True:
            try:
                return call.result(timeout=RETRY_S)
            except grpc.FutureTimeoutError:
                if caller.abandoned():
                    call.cancel()  # type: ignore[no-untyped-call]  # of the two in the stubs it finds the bare one
                    raise FetchFailed("CANCELLED", "nobody waits for this KV any more") from None
            except grpc.FutureCancelledError:  # the channel was closed
                raise FetchFailed("UNAVAILABLE", "the decode service is shutting down") from None

    def close(self) -> None:
        self._channel.close()
