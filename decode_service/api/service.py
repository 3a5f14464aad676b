"""The RPC handlers of the decode service. They wait and translate; the worker decides and computes."""

from __future__ import annotations

import asyncio
import logging
import math
import time
import uuid
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Final, TypeVar

from prometheus_client import CollectorRegistry

from chunk_store.store import ChunkStore
from chunk_store.tenant import DEFAULT_TENANT, Tenant
from decode_service.api import grammars, messages
from decode_service.api.answers import Answer, answers_to
from decode_service.api.chat_in import chat_in, chat_out, check_either
from decode_service.api.explain import Explanation, explain
from decode_service.api.mailbox import Mailbox, deliver_in
from decode_service.api.prompt_logprobs import check_prompt_logprobs, note_prompt_logprobs
from decode_service.api.replies import Replies
from decode_service.api.tool_choice import calls_source, check_forced, forces_call, reply_parser
from decode_service.kept import Kept
from decode_service.prompt.chat import ChatComposer
from decode_service.prompt.composition import Composition, answer_tokens
from decode_service.prompt.resolver import Resolver
from decode_service.prompt.scores import PromptScores
from decode_service.sequence import Failed, FinishReason, Sequence, Tokens
from decode_service.turns import ClaimTurn, TurnKeeper
from decode_service.worker import DecodeWorker
from engine.reuse import ReuseMode
from engine.sampling.params import SamplingRequest
from protos import decode_pb2, decode_pb2_grpc
from serving.errors import Conflict, DeadlineExceeded
from serving.process.same_bits import UNSAID, SameBits
from serving.rpc import wire
from serving.rpc.access import Access, Caller
from serving.rpc.arrival import adopt_request_id, arrived_ns
from serving.rpc.field_bounds import ContentBudget, check_label, check_request_id
from serving.rpc.handlers import Context, Server
from serving.rpc.parsing import text_nbytes_max
from serving.tenancy.text_lanes import TextLanes
from serving.trace.request_id import current_request_id
from serving.trace.stages import StageClock
from text.answer import AnswerText
from text.codec import TextCodec
from text.grammar.compiler import GrammarCompiler

# What GetLoads tells of all tenants together.
OTHERS: Final = (
    *("pages_free", "pages_chunks", "pages_tails", "chunks_resident"),
    *("steps", "step_bytes_read", "step_bytes_flat"),
)

log = logging.getLogger(__name__)

T = TypeVar("T")


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
        self.chats = ChatComposer(resolver.codec, resolver.store)
        served = resolver.served
        self.grammars = GrammarCompiler(
            resolver.codec, vocabulary=served.vocabulary, end_token_ids=served.eos_token_ids
        )
        self.access = access
        self.model_name = model_name
        self.same_bits = same_bits
        self.request_timeout_s = request_timeout_s
        self._registry = registry
        self._lanes = TextLanes()
        self._drain = drain
        self._close = close
        # Whose requests run, and their ids: one tenant's ids say nothing of another's.
        self._active: set[tuple[Tenant, str]] = set()
        self._aborted: set[tuple[Tenant, str]] = set()  # of the active ones; some are not with the worker yet

    # -- life ---------------------------------------------------------------------------------------
    @property
    def registry(self) -> CollectorRegistry:
        return self._registry

    async def start(self) -> None:
        self.worker.start(deliver_in(asyncio.get_running_loop()))
        self.grammars.prepare()

    def add_to(self, server: Server) -> None:
        decode_pb2_grpc.add_DecodeServiceServicer_to_server(self, server)

    async def stop(self) -> None:
        self.turns.stop()
        self.grammars.close()
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
        request_id = self._claim_id(request.request_id, caller.owner)
        sequences: list[Sequence] = []
        try:
            sequences, mailbox = await self._submit(request, context, caller, request_id, clock)
            answers = [self._answer(request, sequence) for sequence in sequences]
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
                                await self._note_kept(answer, reply)
                            if answer.sequence.scores is not None and reply.HasField("complete"):
                                await asyncio.to_thread(self._note_scores, answer, reply.complete)  # can be many
                            yield reply
                        if answer.replies.error is not None:  # what one fails of, all of them end with
                            raise answer.replies.error
                        open_answers -= answer.replies.over
        finally:
            # However the call ends (also cancelled, or the client is gone), its pages come back.
            for sequence in sequences:
                self.turns.forget(sequence)
            self.worker.end(request_id, FinishReason.ABORT, caller.owner)
            self._active.discard((caller.owner, request_id))
            self._aborted.discard((caller.owner, request_id))

    def _answer(self, request: decode_pb2.GenerateRequest, sequence: Sequence) -> Answer:
        """One of a request's answers, from its tokens to what the caller is sent."""
        sampling = request.sampling
        parser = reply_parser(request.chat, sequence.composition.chat, self._codec.answers)
        stream = self._codec.stream(sampling.keep_special_tokens, keep_tags=parser is not None)
        text = AnswerText(stream, sampling.stop, sampling.min_tokens, include_stop=sampling.include_stop)
        replies = Replies(
            text,
            parser=parser,
            stop=lambda: self.worker.finish(sequence, FinishReason.STOP),
            complete=lambda reason, tokens: self._complete(sequence, reason, tokens),
            index=sequence.answer,
            spell=self._codec.token_bytes,
        )
        return Answer(sequence, replies)

    async def _note_kept(self, answer: Answer, reply: decode_pb2.GenerateResponse) -> None:
        """Gathers what the caller is given of the answer; keeps the turn before its last message goes out."""
        if reply.WhichOneof("event") == "delta":
            answer.given.add(reply.delta)
            return
        kept = await asyncio.to_thread(self._keep, answer)
        if kept is not None:
            reply.complete.kept.CopyFrom(messages.kept_out(kept))

    def _note_scores(self, answer: Answer, complete: decode_pb2.Complete) -> None:
        note_prompt_logprobs(complete, answer.sequence, self._codec.token_bytes)

    def _keep(self, answer: Answer) -> Kept | None:
        kept = self.turns.keep(answer.sequence, answer.given.token_ids)
        if kept is not None:
            self.chats.answered(answer.sequence.composition, answer.given.said(), answer.given.token_ids)
        return kept

    @property
    def _codec(self) -> TextCodec:
        return self.resolver.codec

    def _caller(self, request: decode_pb2.GenerateRequest, context: Context) -> Caller:
        check_label("salt", request.salt)
        return self.access.caller(context.invocation_metadata(), request.salt)

    def _claim_id(self, wanted: str, owner: Tenant) -> str:
        check_request_id(wanted)
        request_id = wanted or current_request_id()
        if not wanted and (owner, request_id) in self._active:  # tried again while the first attempt still ends
            request_id = uuid.uuid4().hex
        if (owner, request_id) in self._active:
            raise Conflict(f"{request_id!r} is running", field="request_id", remedy="use another one")
        self._active.add((owner, request_id))
        return request_id

    async def _submit(
        self, request: decode_pb2.GenerateRequest, context: Context, caller: Caller, request_id: str, clock: StageClock
    ) -> tuple[list[Sequence], Mailbox]:
        """Takes a place in the queue for each answer, or is refused at once; then resolves the request and hands its
        answers to the worker, which admits them one by one."""
        places = messages.answers_in(request.sampling)
        self.worker.take_place(caller.tenant, places)
        try:
            sequences, mailbox = await self._compose(request, caller, request_id, clock)
            left_s = context.time_remaining()
            deadline = time.monotonic() + min(self.request_timeout_s, math.inf if left_s is None else left_s)
            for sequence in sequences:
                sequence.deadline = deadline
            self.worker.submit(*sequences)
        except BaseException:
            for _ in range(places):
                self.worker.leave_place(caller.tenant)
            raise
        if (caller.owner, request_id) in self._aborted:
            self.worker.end(request_id, FinishReason.ABORT, caller.owner)
        return sequences, mailbox

    async def _compose(
        self, request: decode_pb2.GenerateRequest, caller: Caller, request_id: str, clock: StageClock
    ) -> tuple[list[Sequence], Mailbox]:
        """The request as a sequence for each answer, and where their events come."""
        grammar = await grammars.compiled(self.grammars, request, caller.tenant)
        composition, sampling = await self._resolve(
            request, caller.salt, lambda composition: self._sampling(request, composition)
        )
        if composition.chat is not None and forces_call(request.chat):
            source = await asyncio.to_thread(calls_source, request.chat, composition.chat, self._codec.answers)
            grammar = await grammars.compiled_calls(self.grammars, source, caller.tenant)
        clock.measured_ns["tokenize"] = time.monotonic_ns() - clock.arrived
        answers = messages.answers_in(request.sampling)
        mailbox = Mailbox(answers)
        bypass = request.cache_use == decode_pb2.CACHE_USE_BYPASS
        prompt = Sequence(request_id, composition, sampling, caller.salt, bypass, mailbox.put, caller.owner, clock)
        prompt.priority = request.priority
        if request.start_within_s:
            prompt.start_by = clock.arrived + int(request.start_within_s * 1e9)
        sequences = answers_to(prompt, answers, mailbox.put)
        if request.sampling.HasField("prompt_logprobs"):  # rows of a cached chunk are not there to be asked
            prompt.bypass, prompt.scores = True, PromptScores(composition, request.sampling.prompt_logprobs)
        for sequence in sequences:
            sequence.keep = self.turns.begin() if request.keep else None
        if grammar is not None:
            await grammars.follow(grammar, sequences)
        self.worker.check_size(sequences[0])
        log.info(
            "accepted: %d prompt tokens, %d chunks, %d answers of at most %d tokens, %s",
            *(composition.prompt_tokens, len(composition.chunks), answers, sampling.params.max_tokens),
            composition.mode.value,
        )
        return sequences, mailbox

    async def _resolve(self, request: decode_pb2.GenerateRequest, salt: str, then: Callable[[Composition], T]) -> T:
        """What ``then`` makes of the request's composition, both in a thread: a prompt can be long."""
        messages.check_sampling(request.sampling)
        messages.check_keep(request)
        messages.check_turn(request)
        check_either(request)
        check_forced(request)
        served = self.resolver.served
        budget = ContentBudget(served.context_length_max, limit=str(served.limit()))
        chat = chat_in(request.chat, budget) if request.HasField("chat") else None
        segments = messages.segments_in(request.segments, budget)
        mode: ReuseMode = wire.reuse_mode(request.reuse_mode)
        order = messages.order_in(request.order)
        count = len(segments) if chat is None else len(chat.messages)

        def resolved() -> Composition:
            if chat is None:
                return self.resolver.resolve(segments, mode, salt, order)
            cut, made = self.chats.segments(chat, salt, text_nbytes_max(served.context_length_max))
            return replace(self.resolver.resolve(cut, mode, salt, order), chat=made)

        async with self._lanes.lane(budget.characters, count):
            return await asyncio.to_thread(lambda: then(resolved()))

    def _sampling(
        self, request: decode_pb2.GenerateRequest, composition: Composition
    ) -> tuple[Composition, SamplingRequest]:
        """The composition with how its answer is drawn. Raises ``RequestError``."""
        served = self.resolver.served
        # A chat's answer ends where the model ends it, as far as there is room.
        usual = messages.MAX_TOKENS_DEFAULT
        if composition.chat is not None:
            usual = max(1, self.worker.tail_tokens_max - len(composition.tail))
        max_tokens = answer_tokens(served, composition, messages.max_tokens_in(request.sampling), usual)
        params = messages.sampling_in(request.sampling, max_tokens, served.vocabulary, served.eos_token_ids)
        check_prompt_logprobs(request.sampling, composition.prompt_tokens)
        stops = frozenset(token for token in params.stops_at(served.eos_token_ids) if token < served.vocabulary)
        if request.cache_use != decode_pb2.CACHE_USE_BYPASS:
            self.resolver.note_use(composition)
        # Else nobody counts the prompt's tokens.
        prompt = composition.token_ids() if params.repetition_penalty != 1.0 else ()
        return composition, SamplingRequest(
            params, prompt, stops, masked=request.HasField("grammar") or forces_call(request.chat)
        )

    @contextmanager
    def _within_timeout(self, mailbox: Mailbox) -> Iterator[None]:
        """An answer that takes too long ends with an event like any other."""
        late = Failed(DeadlineExceeded(f"the answer took longer than {self.request_timeout_s:g} s"))
        expiry = asyncio.get_running_loop().call_later(self.request_timeout_s, mailbox.end, late)
        try:
            yield
        finally:
            expiry.cancel()

    def _complete(self, sequence: Sequence, reason: FinishReason, tokens: int) -> decode_pb2.Complete:
        chat = sequence.composition.chat
        return decode_pb2.Complete(
            chat=None if chat is None else chat_out(chat),
            request_id=sequence.request_id,
            finish_reason=reason.value,
            usage=messages.usage_out(sequence, tokens),
            reuse=messages.sequence_reuse_out(sequence),
            timings=wire.timings_out(sequence.clock.spent_ns()),
            seed=sequence.params.seed,
            model_name=self.model_name,
            index=sequence.answer,
            preemptions=sequence.preemptions,
        )

    # -- the other RPCs -----------------------------------------------------------------------------
    async def Explain(self, request: decode_pb2.GenerateRequest, context: Context) -> decode_pb2.ExplainResponse:
        adopt_request_id(context, request.request_id)
        caller = self._caller(request, context)
        await grammars.compiled(self.grammars, request, caller.tenant)  # which Generate would refuse is refused here
        composition = await self._resolve(request, caller.salt, lambda composition: composition)
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
        found = (owner, request.request_id) in self._active
        if found:
            self._aborted.add((owner, request.request_id))
            self.worker.end(request.request_id, FinishReason.ABORT, owner)
        return decode_pb2.AbortResponse(found=found)

    async def GetLoads(self, request: decode_pb2.GetLoadsRequest, context: Context) -> decode_pb2.GetLoadsResponse:
        occupancy, served, steps = self.worker.occupancy(), self.resolver.served, self.worker.metrics.steps
        reply = decode_pb2.GetLoadsResponse(
            running=occupancy.running,
            waiting=occupancy.waiting,
            waiting_max=self.worker.waiting_max,
            batch_max=self.worker.batch_max,
            pages_total=sum(occupancy.pages.values()),
            pages_free=occupancy.pages["free"],
            pages_chunks=occupancy.pages["chunk"],
            pages_tails=occupancy.pages["tail"],
            chunks_resident=occupancy.chunks_resident,
            page_size=self.worker.residents.pool.page_size,
            model_name=self.model_name,
            model_identity=served.identity,
            context_length_max=served.context_length_max,
            dtype=served.borrowed.dtype_name,
            dtype_reason=served.borrowed.dtype_reason,
            attention=served.decision.attention,
            attention_reason=served.decision.reason,
            context_length_declared=served.limit().declared,
            context_length_reason=served.limit().because,
            same_bits=self.same_bits.always,
            same_bits_reason=self.same_bits.reason,
            tokenizer_identity=self._codec.identity,
            steps=steps.steps,
            step_bytes_read=steps.nbytes_read,
            step_bytes_flat=steps.nbytes_flat,
        )
        caller = self.access.caller(context.invocation_metadata())
        if caller.owner != DEFAULT_TENANT and not caller.sees_all:
            reply.running, reply.waiting = self.worker.places.of(caller.owner)
            for others in OTHERS:
                reply.ClearField(others)
        for mode, refusal in served.refusals.items():
            limit = served.limit(mode)
            reply.modes.add(
                mode=wire.reuse_mode_out(mode),
                supported=not refusal,
                reason=refusal or limit.because,
                context_length_max=0 if refusal else limit.tokens,
            )
        return reply
