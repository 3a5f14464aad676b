"""The RPC handlers of the decode service. They wait and translate; the worker decides and computes."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager

from prometheus_client import CollectorRegistry

from chunk_store.store import ChunkStore
from chunk_store.tenant import DEFAULT_TENANT
from decode_service.api import messages
from decode_service.api.answering import Answering
from decode_service.api.chat_in import chat_out
from decode_service.api.composer import RequestComposer
from decode_service.api.explain import Explanation, explain
from decode_service.api.loads import loads_out
from decode_service.api.mailbox import Mailbox, deliver_in
from decode_service.api.request_ids import RequestIds
from decode_service.device.worker import DecodeWorker
from decode_service.prompt.chat import ChatComposer
from decode_service.prompt.resolver import Resolver
from decode_service.scheduling.sequence import Failed, FinishReason, Sequence, Tokens
from decode_service.turns import ClaimTurn, TurnKeeper
from protos import decode_pb2, decode_pb2_grpc
from serving.errors import DeadlineExceeded
from serving.process.same_bits import UNSAID, SameBits
from serving.rpc.access import Access, Caller
from serving.rpc.arrival import adopt_request_id, arrived_ns
from serving.rpc.field_bounds import check_label, check_request_id
from serving.rpc.handlers import Context, Server
from serving.trace.stages import StageClock


class DecodeService(decode_pb2_grpc.DecodeServiceServicer):
    """Generate, Explain, Abort and GetLoads over one worker."""

    def __init__(
        self,
        worker: DecodeWorker,
        resolver: Resolver,
        access: Access,
        registry: CollectorRegistry,
        *,
        model_name: str,
        same_bits: SameBits = UNSAID,
        request_timeout_s: float,
        close: Callable[[], None],
        claim_turn: ClaimTurn | None = None,
        drain: Callable[[], None] = lambda: None,
    ) -> None:
        """``drain`` is called before the device thread ends, ``close`` after it; ``claim_turn``: see ``TurnKeeper``."""
        self.worker = worker
        self.resolver = resolver
        self.turns = TurnKeeper(worker, resolver, claim_turn)
        chats = ChatComposer(resolver.codec, resolver.store)
        self.composer = RequestComposer(worker, resolver, chats, self.turns)
        self.answering = Answering(worker, resolver.codec, chats, self.turns, model_name=model_name)
        self.ids = RequestIds()
        self.access = access
        self.model_name = model_name
        self.same_bits = same_bits
        self.request_timeout_s = request_timeout_s
        self._registry = registry
        self._drain = drain
        self._close = close

    # -- life ---------------------------------------------------------------------------------------
    @property
    def registry(self) -> CollectorRegistry:
        return self._registry

    async def start(self) -> None:
        self.worker.start(deliver_in(asyncio.get_running_loop()))
        self.composer.start()

    def add_to(self, server: Server) -> None:
        decode_pb2_grpc.add_DecodeServiceServicer_to_server(self, server)

    async def stop(self) -> None:
        self.turns.stop()
        self.composer.stop()
        await asyncio.to_thread(self._drain)
        await asyncio.to_thread(self.worker.stop)
        await asyncio.to_thread(self._close)

    # -- Generate -----------------------------------------------------------------------------------
    async def Generate(
        self, request: decode_pb2.GenerateRequest, context: Context
    ) -> AsyncIterator[decode_pb2.GenerateResponse]:
        clock = StageClock(arrived=arrived_ns())
        adopt_request_id(context, request.request_id)
        caller = self._caller(request, context)
        request_id = self.ids.claim(request.request_id, caller.owner)
        sequences: list[Sequence] = []
        try:
            sequences, mailbox = await self._submit(request, context, caller, request_id, clock)
            answers = [self.answering.answer(request, sequence) for sequence in sequences]
            open_answers, begun = len(answers), False
            # All in this one generator: each that a reply passes through takes its time for every token.
            with self._within_timeout(mailbox):
                while open_answers:
                    for index, events in await mailbox.take():
                        answer = answers[index]
                        if not begun and isinstance(events[0], Tokens):
                            begun = True
                            self.worker.metrics.first_token_sent(clock)
                        for reply in answer.replies.of(events):
                            if answer.sequence.keep is not None:
                                await self.answering.note_kept(answer, reply)
                            if answer.sequence.scores is not None:
                                await self.answering.note_scores(answer, reply)
                            yield reply
                        if answer.replies.error is not None:  # what one fails of, all of them end with
                            raise answer.replies.error
                        open_answers -= answer.replies.over
        finally:
            # However the call ends (also cancelled, or the client is gone), its pages come back.
            for sequence in sequences:
                self.turns.forget(sequence)
            self.worker.end(request_id, FinishReason.ABORT, caller.owner)
            self.ids.release(request_id, caller.owner)

    def _caller(self, request: decode_pb2.GenerateRequest, context: Context) -> Caller:
        check_label("salt", request.salt)
        return self.access.caller(context.invocation_metadata(), request.salt)

    async def _submit(
        self, request: decode_pb2.GenerateRequest, context: Context, caller: Caller, request_id: str, clock: StageClock
    ) -> tuple[list[Sequence], Mailbox]:
        """Takes a place in the queue for each answer, or is refused at once; then resolves the request and hands its
        answers to the worker, which admits them one by one."""
        places = messages.answers_in(request.sampling)
        self.worker.take_place(caller.tenant, places)
        try:
            sequences, mailbox = await self.composer.sequences(request, caller, request_id, clock)
            left_s = context.time_remaining()
            deadline = time.monotonic() + min(self.request_timeout_s, math.inf if left_s is None else left_s)
            for sequence in sequences:
                sequence.deadline = deadline
            self.worker.submit(*sequences)
        except BaseException:
            for _ in range(places):
                self.worker.leave_place(caller.tenant)
            raise
        if self.ids.is_aborted(request_id, caller.owner):
            self.worker.end(request_id, FinishReason.ABORT, caller.owner)
        return sequences, mailbox

    @contextmanager
    def _within_timeout(self, mailbox: Mailbox) -> Iterator[None]:
        """An answer that takes too long ends with an event like any other."""
        late = Failed(DeadlineExceeded(f"the answer took longer than {self.request_timeout_s:g} s"))
        expiry = asyncio.get_running_loop().call_later(self.request_timeout_s, mailbox.end, late)
        try:
            yield
        finally:
            expiry.cancel()

    # -- the other RPCs -----------------------------------------------------------------------------
    async def Explain(self, request: decode_pb2.GenerateRequest, context: Context) -> decode_pb2.ExplainResponse:
        adopt_request_id(context, request.request_id)
        caller = self._caller(request, context)
        composition = await self.composer.prompt(request, caller)
        bypass = messages.computes_anew(request)
        found: Explanation = await asyncio.to_thread(explain, self.worker, self.store, composition, bypass=bypass)
        return decode_pb2.ExplainResponse(
            chat=None if composition.chat is None else chat_out(composition.chat),
            prompt_tokens=composition.prompt_tokens,
            cached_tokens=composition.cached_tokens,
            computed_tokens=composition.prompt_tokens - composition.cached_tokens,
            reuse=messages.reuse_out(composition),
            bytes_to_load=found.nbytes_to_load,
            bytes_to_compute=found.nbytes_to_compute,
            bytes_read_per_step=found.nbytes_per_step,
            bytes_shared_per_step=found.nbytes_shared,
        )

    @property
    def store(self) -> ChunkStore:
        return self.resolver.store

    async def Abort(self, request: decode_pb2.AbortRequest, context: Context) -> decode_pb2.AbortResponse:
        """Another tenant's request is as unknown as one that does not exist; without tokens all are everybody's."""
        check_request_id(request.request_id)
        owner = self.access.caller(context.invocation_metadata()).owner
        found = self.ids.abort(request.request_id, owner)
        if found:
            self.worker.end(request.request_id, FinishReason.ABORT, owner)
        return decode_pb2.AbortResponse(found=found)

    async def GetLoads(self, request: decode_pb2.GetLoadsRequest, context: Context) -> decode_pb2.GetLoadsResponse:
        caller = self.access.caller(context.invocation_metadata())
        all_seen = caller.owner == DEFAULT_TENANT or caller.sees_all
        return loads_out(
            self.worker,
            self.resolver,
            model_name=self.model_name,
            same_bits=self.same_bits,
            owner=None if all_seen else caller.owner,
        )
