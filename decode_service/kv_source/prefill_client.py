"""Asks the prefill service for KV that is missing, over gRPC, from a loader thread."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence

from chunk_store.key import ChunkKey
from decode_service.kv_source.asking import ComputedChunk, FetchTerms
from decode_service.prompt.composition import Composition
from decode_service.prompt.request_chunk import Unpublished
from protos import chunks_pb2, prefill_pb2, prefill_pb2_grpc
from serving.errors import (
    STORE_FULL,
    STORE_UNAVAILABLE,
    Cancelled,
    DeadlineExceeded,
    InternalFault,
    Overloaded,
    RequestError,
    Unavailable,
)
from serving.handover.lent import Lent, Offer
from serving.rpc.channel import Target, call_metadata
from serving.rpc.client import call, stream
from serving.rpc.wire import reuse_mode_out
from serving.trace.request_id import current_request_id

RETRY_S = 0.25
# A call gets as long as the slowest device worth having takes for its tokens, behind as many again of others.
CALL_S, CALL_S_A_TOKEN = 60.0, 0.1
OPEN_S = 5.0  # to say where its pool is
HUNG_CALLS_MAX = 2  # calls that run out of that time before the request is given up; the next goes to another peer
MARGIN_S, MARGIN_SHARE = 0.5, 0.1  # before the caller's deadline, to tell it why; of short ones a tenth
# A connection whose peer answers no ping is given up; a service that allows no pings this frequent ends it itself.
KEEPALIVE_S, KEEPALIVE_TIMEOUT_S = 10.0, 5.0
_UNPUBLISHED = {STORE_FULL: Unpublished.STORE_FULL, STORE_UNAVAILABLE: Unpublished.STORE_UNAVAILABLE}
_UNPUBLISHED_IN = {
    chunks_pb2.UNPUBLISHED_UNSPECIFIED: None,
    chunks_pb2.UNPUBLISHED_STORE_FULL: Unpublished.STORE_FULL,
    chunks_pb2.UNPUBLISHED_STORE_UNAVAILABLE: Unpublished.STORE_UNAVAILABLE,
}


class RemotePrefillClient:
    """One channel to a prefill service (or several, by gRPC's own name resolution and balancing).

    A service that goes away is tried again until the caller's deadline, for what it had not answered for: one that
    starts anew may have a large model to load. A call gets ``call_s`` and ``call_s_a_token`` for each token that may
    have to be computed; one that runs out of it is made once more, on the next peer where there are several.
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
        self._token = token
        balanced = (("grpc.lb_policy_name", "round_robin"),)
        self._channel = Target(target, ca, keepalive_s, keepalive_timeout_s, balanced).open()
        self._stub = prefill_pb2_grpc.PrefillServiceStub(self._channel)

    def compute_all(
        self, composition: Composition, indices: Sequence[int], terms: FetchTerms
    ) -> Iterator[ComputedChunk]:
        """Has the KV of chunks made, and of their context; yields each as soon as it is stored, or why it is not.

        Raises ``RequestError``.
        """
        left = list(indices)
        hung, asked_at = 0, time.monotonic()
        margin_s = min(MARGIN_S, MARGIN_SHARE * (terms.deadline - asked_at))
        while left:
            asked = len(left)
            try:
                yield from self._call(composition, left, terms)
                return
            except Cancelled:
                if terms.abandoned():
                    raise
                raise Unavailable("the decode service is shutting down") from None
            except RequestError as error:
                if error.reason in _UNPUBLISHED:
                    why = _UNPUBLISHED[error.reason]
                    for index in left:
                        yield ComputedChunk(index, composition.chunks[index].key, durable=False, unpublished=why)
                    return
                hung = 0 if len(left) < asked else hung + isinstance(error, DeadlineExceeded)
                pause_s = self._pause_s(error)
                now = time.monotonic()
                out_of_time = now + pause_s >= terms.deadline - margin_s
                if out_of_time or terms.abandoned() or hung >= HUNG_CALLS_MAX:
                    raise self._gave_up(error, now - asked_at) from error
            time.sleep(pause_s)

    def _call(self, composition: Composition, left: list[int], terms: FetchTerms) -> Iterator[ComputedChunk]:
        """One call for those that are ``left``, which each one that is yielded leaves."""
        request = prefill_pb2.PrefillCompositionRequest(
            chunk_ids=[chunk.segment.chunk_id for chunk in composition.chunks[: left[-1] + 1]],
            wanted=left,
            reuse_mode=reuse_mode_out(composition.mode),
            salt=terms.salt,
            durable=terms.durable,
            borrower=terms.borrower,
        )
        replies = stream(
            self._stub.PrefillComposition,
            request,
            timeout_s=min(self._work_s(composition, left), max(0.0, terms.deadline - time.monotonic())),
            metadata=call_metadata(self._token, current_request_id()),
            abandoned=terms.abandoned,
        )
        for reply in replies:
            if reply.index not in left or reply.unpublished not in _UNPUBLISHED_IN:
                break
            left.remove(reply.index)
            why = _UNPUBLISHED_IN[reply.unpublished]
            yield ComputedChunk(reply.index, ChunkKey(reply.key), reply.durable, why, lent=_lent(reply))
        if left:
            raise InternalFault("it did not answer for what it was asked", remedy="use the same version of both")

    def _work_s(self, composition: Composition, indices: Sequence[int]) -> float:
        """How long a call may take."""
        chunks = composition.chunks
        needed = {each for index in indices for each in (*chunks[index].context, index)}
        return self._call_s + self._call_s_a_token * sum(len(chunks[index].token_ids) for index in needed)

    def _pause_s(self, error: RequestError) -> float:
        """Seconds until the next attempt. Raises ``RequestError`` where another one would fare no better."""
        if isinstance(error, DeadlineExceeded):
            return 0.0
        if error.retry:
            return max(RETRY_S, error.retry_after_s or 0.0)
        raise type(error)(f"prefill service {self.target}: {error.message}") from error

    def _gave_up(self, error: RequestError, after_s: float) -> RequestError:
        """What a request ends with that has no more time, or has met a peer that hangs."""
        if isinstance(error, Overloaded):
            return Overloaded(f"prefill service {self.target}: {error.message}")
        was = "did not answer" if isinstance(error, DeadlineExceeded) else "was not there"
        return Unavailable(f"prefill service {self.target} {was} for {after_s:.0f} s: {error.message}")

    def open_hand_over(self, borrower: str) -> Offer:
        """Where the pool of a prefill service of this host can be opened. Raises ``RequestError``."""
        reply = call(
            self._stub.OpenHandOver,
            prefill_pb2.OpenHandOverRequest(borrower=borrower),
            timeout_s=OPEN_S,
            metadata=call_metadata(self._token, current_request_id()),
            abandoned=lambda: False,
        )
        return Offer(reply.pool, reply.socket, reply.ticket)

    def close(self) -> None:
        self._channel.close()


def _lent(reply: prefill_pb2.PrefillCompositionResponse) -> Lent | None:
    if not reply.HasField("lent"):
        return None
    return Lent(reply.lent.pool, reply.lent.lease, reply.lent.first_slot, reply.lent.tokens)
