"""The RPCs of cairn.v1.PrefillService. What goes wrong is raised; ``serving.rpc.gate`` makes a status of it."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import aclosing, suppress
from typing import Any

from chunk_store.errors import StoreError
from chunk_store.key import ChunkId
from chunk_store.store import ChunkStore
from chunk_store.tenant import SHARED_SALT, SHARED_TENANT, Tenant
from prefill_service.api import messages
from prefill_service.api.ordered import in_order
from prefill_service.jobs.job import PrefillJobs
from prefill_service.jobs.progress import ChunkMade
from prefill_service.jobs.resolver import PrefillJob, not_yours
from protos import chunks_pb2, prefill_pb2, prefill_pb2_grpc
from serving.errors import InternalFault, InvalidRequest, PermissionDenied, Unsupported, request_error
from serving.handover.lender import Lender
from serving.process.same_bits import SameBits
from serving.resolving import check_tokenizer, unknown_chunk
from serving.rpc.access import Access, Caller
from serving.rpc.arrival import adopt_request_id
from serving.rpc.errors import status_name, status_number
from serving.rpc.field_bounds import ContentBudget, check_label, check_request_id
from serving.rpc.handlers import Context, Server
from serving.rpc.wire import timings_out
from serving.trace.request_id import set_request_id
from serving.trace.stages import StageTimer

FULL_NAME = prefill_pb2.DESCRIPTOR.services_by_name["PrefillService"].full_name
STREAM_WINDOW = 4  # requests of one stream that are worked on at once
SWEEP_EVERY_S = 15.0
ALONE = SameBits(True, "every piece of a chunk is a forward of its own")

log = logging.getLogger(__name__)


class PrefillService(prefill_pb2_grpc.PrefillServiceServicer):
    """Handlers over the jobs and their store; ``start`` and ``stop`` come in pairs."""

    def __init__(
        self,
        jobs: PrefillJobs,
        store: ChunkStore,
        access: Access,
        model_name: str,
        same_bits: SameBits = ALONE,
        lender: Lender | None = None,
    ) -> None:
        self.jobs = jobs
        self.store = store
        self.access = access
        self.model_name = model_name
        self.same_bits = same_bits
        self.model_identity = jobs.computer.served.identity
        self.registry = jobs.metrics.registry
        self.lender = lender
        self._sweeper: asyncio.Task[None] | None = None

    # -- life ---------------------------------------------------------------------------------------
    async def start(self) -> None:
        if self.lender is not None:
            self.lender.start()
        self._sweeper = asyncio.create_task(self._sweep())

    def add_to(self, server: Server) -> None:
        prefill_pb2_grpc.add_PrefillServiceServicer_to_server(self, server)

    async def stop(self) -> None:
        if self._sweeper is not None:
            self._sweeper.cancel()
            with suppress(asyncio.CancelledError):
                await self._sweeper
        if self.lender is not None:
            await asyncio.to_thread(self.lender.stop)
        await self.jobs.stop()
        await asyncio.to_thread(self.store.close)

    async def _sweep(self) -> None:
        """The store's upkeep: what dead writers left, what has expired."""
        while True:
            try:
                await self.jobs.in_store_thread(self.store.sweep)
            except StoreError as error:
                log.warning("the store could not be swept: %s", error)
            await asyncio.sleep(SWEEP_EVERY_S)

    # -- prefill ------------------------------------------------------------------------------------
    async def PrefillChunk(self, request: prefill_pb2.PrefillChunkRequest, context: Context) -> Any:
        adopt_request_id(context, request.request_id)
        timer = StageTimer()
        try:
            return await self._finish(await self._register(request, context, timer), timer)
        except Exception as error:
            self._count_error(error, timer)
            raise

    async def PrefillChunks(
        self, requests: AsyncIterator[prefill_pb2.PrefillChunkRequest], context: Context
    ) -> AsyncIterator[prefill_pb2.PrefillChunksResponse]:
        """Registers in the stream's order, so that a request may name what an earlier one registered."""

        async def begin(request: prefill_pb2.PrefillChunkRequest) -> asyncio.Task[prefill_pb2.PrefillChunksResponse]:
            registered = asyncio.Event()
            task = asyncio.create_task(self._entry(request, context, registered))
            try:
                await registered.wait()
            except asyncio.CancelledError:
                task.cancel()
                raise
            return task

        async with aclosing(in_order(requests, begin, STREAM_WINDOW)) as entries:
            async for entry in entries:
                yield entry

    async def _entry(
        self, request: prefill_pb2.PrefillChunkRequest, context: Context, registered: asyncio.Event
    ) -> prefill_pb2.PrefillChunksResponse:
        """One request of a stream; what goes wrong with it becomes its entry."""
        if request.request_id:
            set_request_id(request.request_id)
        timer = StageTimer()
        try:
            job = await self._register(request, context, timer)
            registered.set()
            return prefill_pb2.PrefillChunksResponse(response=await self._finish(job, timer))
        except Exception as error:
            self._count_error(error, timer)
            told = request_error(error)
            if isinstance(told, InternalFault) and told is not error:
                log.error("an entry of a stream failed", exc_info=error)
            return prefill_pb2.PrefillChunksResponse(
                error=prefill_pb2.PrefillError(code=status_number(told), message=told.message)
            )
        finally:
            registered.set()  # or refused

    async def _register(
        self, request: prefill_pb2.PrefillChunkRequest, context: Context, timer: StageTimer
    ) -> PrefillJob:
        caller = self._caller(request, context)
        if request.shared and not caller.admin:
            raise PermissionDenied(
                "only a token marked admin in the token file may publish for every tenant", field="shared"
            )
        salt = SHARED_SALT if request.shared else caller.salt
        served = self.jobs.computer.served
        budget = ContentBudget(served.context_length_max, "chunk", limit=str(served.limit()))
        check_request_id(request.request_id)
        asked = messages.chunk_request(request, salt, budget)
        return await self.jobs.register(asked, timer)

    async def PrefillComposition(
        self, request: prefill_pb2.PrefillCompositionRequest, context: Context
    ) -> AsyncIterator[prefill_pb2.PrefillCompositionResponse]:
        adopt_request_id(context, request.request_id)
        timer = StageTimer()
        try:
            check_request_id(request.request_id)
            asked = messages.composition_request(request, self._caller(request, context))
            job = await self.jobs.compose(asked, timer)
            left = len(job.wanted)
            async with aclosing(self.jobs.walk(job, timer)) as walk:
                async for made in walk:
                    left -= 1
                    response = messages.composition_response(job, made)
                    if not left:
                        response.timings.CopyFrom(timings_out(timer.spent_ns()))
                    self._note(job, made, timer)
                    yield response
        except Exception as error:
            self._count_error(error, timer)
            raise

    async def OpenHandOver(self, request: prefill_pb2.OpenHandOverRequest, context: Context) -> Any:
        caller = self.access.caller(context.invocation_metadata())
        if not caller.acts_for_all:
            raise PermissionDenied(
                "KV is handed over only to who may act for every tenant, with a token without a salt"
            )
        if self.lender is None:
            raise Unsupported("this service hands no KV over", remedy="start it with --hand-over; its log says more")
        if not request.borrower:
            raise InvalidRequest("missing", field="borrower", remedy="give a name that nobody else has")
        check_label("borrower", request.borrower)
        offer = self.lender.offer(request.borrower)
        return prefill_pb2.OpenHandOverResponse(pool=offer.pool, socket=offer.socket, ticket=offer.ticket)

    def _note(self, job: PrefillJob, made: ChunkMade, timer: StageTimer) -> None:
        """A chunk of a composition is answered for."""
        outcome, tokens = messages.outcome(made), len(job.chunks[made.index].token_ids)
        elapsed_ns = timer.elapsed_ns()
        log.info("%s: chunk %s of %d tokens, %.1f ms", outcome, job.chunk_ids[made.index], tokens, elapsed_ns / 1e6)
        self.jobs.metrics.request_ended(outcome, elapsed_ns / 1e9)

    def _caller(self, request: Any, context: Context) -> Caller:
        """Who calls, and under which salt; ``request`` is any that can name one."""
        return self.access.caller(context.invocation_metadata(), request.salt)

    async def _finish(self, job: PrefillJob, timer: StageTimer) -> prefill_pb2.PrefillChunkResponse:
        result = await self.jobs.run(job, timer)
        outcome = "computed" if result.computed_tokens else "already_stored"
        log.info(
            "%s: chunk %s of %d tokens; %d tokens computed, %d reused, %.1f ms",
            *(outcome, job.chunk_id, job.tokens, result.computed_tokens, result.reused_tokens),
            timer.elapsed_ns() / 1e6,
        )
        self.jobs.metrics.request_ended(outcome, timer.elapsed_ns() / 1e9)
        return messages.prefill_response(result, self.model_identity)

    def _count_error(self, error: Exception, timer: StageTimer) -> None:
        self.jobs.metrics.request_ended(status_name(request_error(error)).lower(), timer.elapsed_ns() / 1e9)

    # -- administration -----------------------------------------------------------------------------
    async def GetChunk(self, request: prefill_pb2.GetChunkRequest, context: Context) -> chunks_pb2.Chunk:
        chunk_id, tenant = messages.chunk_id_of(request.chunk_id), self._caller(request, context).tenant
        return await self.jobs.in_store_thread(
            lambda: self._chunk(chunk_id, tenant, token_ids=request.include_token_ids, text=request.include_text)
        )

    async def ListChunks(self, request: prefill_pb2.ListChunksRequest, context: Context) -> Any:
        query = messages.record_query(request, self._caller(request, context).tenant)

        def listed() -> prefill_pb2.ListChunksResponse:
            try:
                page = self.store.list_records(query)
            except ValueError as error:
                raise InvalidRequest(str(error), field="page_token") from error
            ids = [record.chunk_id for record in page.records]
            entries = self.store.list_entries(ids, query.tenants) if ids else []
            chunks = [messages.chunk_message(record, entries) for record in page.records]
            return prefill_pb2.ListChunksResponse(chunks=chunks, next_page_token=page.next_cursor)

        return await self.jobs.in_store_thread(listed)

    async def PinChunk(self, request: prefill_pb2.PinChunkRequest, context: Context) -> chunks_pb2.Chunk:
        chunk_id, caller = messages.chunk_id_of(request.chunk_id), self._caller(request, context)
        return await self.jobs.in_store_thread(lambda: self._set_pinned(chunk_id, True, caller))

    async def UnpinChunk(self, request: prefill_pb2.UnpinChunkRequest, context: Context) -> chunks_pb2.Chunk:
        chunk_id, caller = messages.chunk_id_of(request.chunk_id), self._caller(request, context)
        return await self.jobs.in_store_thread(lambda: self._set_pinned(chunk_id, False, caller))

    async def DeleteChunk(self, request: prefill_pb2.DeleteChunkRequest, context: Context) -> Any:
        """The caller's own chunk, or its own KV of a shared one; an admin's, without one of its own, the shared one."""
        chunk_id, caller = messages.chunk_id_of(request.chunk_id), self._caller(request, context)
        report = await self.jobs.delete(chunk_id, caller.tenant)
        if not report.records and not report.entries:
            await self.jobs.in_store_thread(lambda: self._check_shared(chunk_id, caller))
        if not report.records and caller.admin:
            report = await self.jobs.delete(chunk_id, SHARED_TENANT)
        return prefill_pb2.DeleteChunkResponse(kv_entries=report.entries, kv_bytes=report.nbytes)

    async def StoreStats(self, request: prefill_pb2.StoreStatsRequest, context: Context) -> Any:
        caller = self._caller(request, context)
        stats = await self.jobs.in_store_thread(self.store.stats)
        if caller.sees_all and not request.salt:
            return messages.stats_message(stats, self.model_identity, self.model_name)
        usage = await self.jobs.in_store_thread(lambda: self.store.usage(caller.tenant))
        quotas = self.jobs.resolver.quotas.of(caller.tenant)
        return messages.usage_message(stats, usage, quotas, self.model_identity, self.model_name)

    def _set_pinned(self, chunk_id: ChunkId, pinned: bool, caller: Caller) -> chunks_pb2.Chunk:
        tenant, limits = caller.tenant, self.jobs.resolver.quotas.of(caller.tenant).limits
        if not self.store.set_pinned([chunk_id], pinned, tenant, limits=limits)[0]:
            self._check_shared(chunk_id, caller)
            tenant = SHARED_TENANT
            self.store.set_pinned([chunk_id], pinned, tenant)
        return self._chunk(chunk_id, tenant)

    def _check_shared(self, chunk_id: ChunkId, caller: Caller) -> None:
        """Raises ``RequestError`` unless the chunk is shared and the caller may change it."""
        if self.store.get_records([chunk_id], [SHARED_TENANT])[0] is None:
            raise unknown_chunk("chunk_id", chunk_id)
        if not caller.admin:
            raise not_yours("chunk_id", chunk_id)

    def _chunk(
        self, chunk_id: ChunkId, tenant: Tenant, *, token_ids: bool = False, text: bool = False
    ) -> chunks_pb2.Chunk:
        resolver = self.jobs.resolver
        record = resolver.resolve_id(chunk_id, tenant)
        message = messages.chunk_message(record, self.store.list_entries([chunk_id], [record.tenant]))
        if token_ids:
            message.token_ids.extend(record.token_ids)
        if text:
            check_tokenizer(record, "include_text", resolver.codec.identity)
            message.text = resolver.codec.decode(record.token_ids, keep_special=True)
        return message
