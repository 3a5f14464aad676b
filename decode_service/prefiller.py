"""Asks the prefill service for KV that is missing, over gRPC, from a loader thread."""

from __future__ import annotations

import time

import grpc

from chunk_store.key import ChunkKey
from decode_service.composition import Composition
from decode_service.source import Abandoned, FetchFailed
from protos import prefill_pb2, prefill_pb2_grpc
from serving.arrival import REQUEST_ID_KEY
from serving.logs import current_request_id
from serving.parsing import MESSAGE_NBYTES_MAX
from serving.wire import reuse_mode_out

RETRY_S = 0.25
# A service that goes away ends calls with UNAVAILABLE, or with CANCELLED when its time to drain is over.
_AWAY = (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED)


class RemotePrefiller:
    """One channel to a prefill service (or several, by gRPC's own name resolution and balancing).

    A call has ``timeout_s``; a service that goes away is tried again for ``patience_s`` from then on, so that
    one that is being restarted is not an error.
    """

    def __init__(
        self,
        target: str,
        *,
        timeout_s: float = 300.0,
        patience_s: float = 15.0,
        token: str = "",
        ca: bytes | None = None,
    ) -> None:
        self.target = target
        self._timeout_s = timeout_s
        self._patience_s = patience_s
        self._metadata = (("authorization", f"Bearer {token}"),) if token else ()
        options = (
            ("grpc.max_receive_message_length", MESSAGE_NBYTES_MAX),
            ("grpc.max_send_message_length", MESSAGE_NBYTES_MAX),
            ("grpc.lb_policy_name", "round_robin"),
            ("grpc.max_reconnect_backoff_ms", 1000),
        )
        if ca is None:
            self._channel = grpc.insecure_channel(target, options)
        else:
            self._channel = grpc.secure_channel(target, grpc.ssl_channel_credentials(ca), options)
        self._stub = prefill_pb2_grpc.PrefillServiceStub(self._channel)

    def compute(self, composition: Composition, index: int, salt: str, abandoned: Abandoned) -> ChunkKey:
        """Makes the KV of chunk ``index``, and of its context, exist in the store. Raises ``FetchFailed``."""
        request = prefill_pb2.PrefillChunkRequest(
            chunk_id=composition.parts[index].chunk_id,
            context_chunk_ids=[part.chunk_id for part in composition.parts[:index]],
            reuse_mode=reuse_mode_out(composition.mode),
            salt=salt,
        )
        until: float | None = None  # set when the service goes away
        while True:
            try:
                return ChunkKey(self._call(request, abandoned).key)
            except grpc.RpcError as error:
                until = until or time.monotonic() + self._patience_s
                if error.code() not in _AWAY:
                    raise FetchFailed(error.code().name, f"prefill service {self.target}: {error.details()}") from error
                if time.monotonic() >= until or abandoned():
                    message = f"prefill service {self.target} was not there for {self._patience_s:g} s"
                    raise FetchFailed("UNAVAILABLE", f"{message}: {error.details()}") from error
            time.sleep(RETRY_S)

    def _call(self, request: prefill_pb2.PrefillChunkRequest, abandoned: Abandoned) -> prefill_pb2.PrefillChunkResponse:
        """One call, cancelled when nobody waits for it any more. Raises ``RpcError`` or ``FetchFailed``."""
        metadata = (*self._metadata, (REQUEST_ID_KEY, current_request_id()))
        call = self._stub.PrefillChunk.future(request, timeout=self._timeout_s, metadata=metadata)
        while True:
            try:
                reply: prefill_pb2.PrefillChunkResponse = call.result(timeout=RETRY_S)
                return reply
            except grpc.FutureTimeoutError:
                if abandoned():
                    call.cancel()
                    raise FetchFailed("CANCELLED", "nobody waits for this KV any more") from None
            except grpc.FutureCancelledError:  # the channel was closed
                raise FetchFailed("UNAVAILABLE", "the decode service is shutting down") from None

    def close(self) -> None:
        self._channel.close()
