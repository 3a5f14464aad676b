"""From a request's message to the sequences that answer it: its prompt, how its answers are drawn, what they follow."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from dataclasses import replace
from typing import TypeVar

from decode_service.api import grammars, messages
from decode_service.api.answers import answers_to
from decode_service.api.chat_in import chat_in, check_either
from decode_service.api.mailbox import Mailbox
from decode_service.api.prompt_logprobs import check_prompt_logprobs
from decode_service.api.tool_choice import calls_source, check_forced, forces_call
from decode_service.device.worker import DecodeWorker
from decode_service.prompt.chat import ChatComposer
from decode_service.prompt.composition import Composition, answer_tokens
from decode_service.prompt.resolver import Resolver
from decode_service.prompt.scores import PromptScores
from decode_service.scheduling.sequence import Sequence
from decode_service.turns import TurnKeeper
from engine.reuse import ReuseMode
from engine.sampling.params import SamplingRequest
from protos import decode_pb2
from serving.rpc import wire
from serving.rpc.access import Caller
from serving.rpc.field_bounds import ContentBudget
from serving.rpc.parsing import text_nbytes_max
from serving.tenancy.text_lanes import TextLanes
from serving.trace.stages import StageClock
from text.grammar.compiler import GrammarCompiler

log = logging.getLogger(__name__)

T = TypeVar("T")


class RequestComposer:
    """Composes requests for one worker. Its methods raise ``RequestError`` naming the field that is not acceptable."""

    def __init__(self, worker: DecodeWorker, resolver: Resolver, chats: ChatComposer, turns: TurnKeeper) -> None:
        served = resolver.served
        self.chats = chats
        self._worker = worker
        self._resolver = resolver
        self._turns = turns
        self._grammars = GrammarCompiler(
            resolver.codec, vocabulary=served.vocabulary, end_token_ids=served.eos_token_ids
        )
        self._lanes = TextLanes()

    def start(self) -> None:
        self._grammars.prepare()

    def stop(self) -> None:
        self._grammars.close()

    async def prompt(self, request: decode_pb2.GenerateRequest, caller: Caller) -> Composition:
        """The composition of a request alone; what ``sequences`` would refuse of its grammar is refused here."""
        await grammars.compiled(self._grammars, request, caller.tenant)
        return await self._resolve(request, caller.salt, lambda composition: composition)

    async def sequences(
        self, request: decode_pb2.GenerateRequest, caller: Caller, request_id: str, clock: StageClock
    ) -> tuple[list[Sequence], Mailbox]:
        """The request as a sequence for each answer, and where their events come."""
        grammar = await grammars.compiled(self._grammars, request, caller.tenant)
        composition, sampling = await self._resolve(
            request, caller.salt, lambda composition: self._sampling(request, composition)
        )
        if composition.chat is not None and forces_call(request.chat):
            source = await asyncio.to_thread(calls_source, request.chat, composition.chat, self._resolver.codec.answers)
            grammar = await grammars.compiled_calls(self._grammars, source, caller.tenant)
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
            sequence.keep = self._turns.begin() if request.keep else None
        if grammar is not None:
            await grammars.follow(grammar, sequences)
        self._worker.check_size(sequences[0])
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
        served = self._resolver.served
        budget = ContentBudget(served.context_length_max, limit=str(served.limit()))
        chat = chat_in(request.chat, budget) if request.HasField("chat") else None
        segments = messages.segments_in(request.segments, budget)
        mode: ReuseMode = wire.reuse_mode(request.reuse_mode)
        order = messages.order_in(request.order)
        count = len(segments) if chat is None else len(chat.messages)

        def resolved() -> Composition:
            if chat is None:
                return self._resolver.resolve(segments, mode, salt, order)
            cut, made = self.chats.segments(chat, salt, text_nbytes_max(served.context_length_max))
            return replace(self._resolver.resolve(cut, mode, salt, order), chat=made)

        async with self._lanes.lane(budget.characters, count):
            return await asyncio.to_thread(lambda: then(resolved()))

    def _sampling(
        self, request: decode_pb2.GenerateRequest, composition: Composition
    ) -> tuple[Composition, SamplingRequest]:
        """The composition with how its answer is drawn."""
        served = self._resolver.served
        # A chat's answer ends where the model ends it, as far as there is room.
        usual = messages.MAX_TOKENS_DEFAULT
        if composition.chat is not None:
            usual = max(1, self._worker.tail_tokens_max - len(composition.tail))
        max_tokens = answer_tokens(served, composition, messages.max_tokens_in(request.sampling), usual)
        params = messages.sampling_in(request.sampling, max_tokens, served.vocabulary, served.eos_token_ids)
        check_prompt_logprobs(request.sampling, composition.prompt_tokens)
        stops = frozenset(token for token in params.stops_at(served.eos_token_ids) if token < served.vocabulary)
        if request.cache_use != decode_pb2.CACHE_USE_BYPASS:
            self._resolver.note_use(composition)
        # Else nobody counts the prompt's tokens.
        prompt = composition.token_ids() if params.repetition_penalty != 1.0 else ()
        return composition, SamplingRequest(
            params, prompt, stops, masked=request.HasField("grammar") or forces_call(request.chat)
        )
