"""A prefill service inside the test process: the real parts over a tiny model, on a loopback port."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc import StatusCode

from prefill_service.__main__ import build
from prefill_service.api.service import FULL_NAME, PrefillService
from prefill_service.jobs.own_pool import OwnPool
from prefill_service.options import PrefillOptions
from protos import chunks_pb2, prefill_pb2, prefill_pb2_grpc
from serving.process.loading import Loaded, load
from serving.process.options import ServiceOptions
from serving.rpc.access import Access
from serving.rpc.server import RpcServer

COMPUTED = prefill_pb2.PrefillChunkResponse.OUTCOME_COMPUTED
ALREADY_STORED = prefill_pb2.PrefillChunkResponse.OUTCOME_ALREADY_STORED
DEADLINE_S = 30.0


@dataclass
class Worker:
    """A running service, its stub, and the parts that tests look into."""

    service: PrefillService
    server: RpcServer
    port: int
    stub: Any

    @property
    def computer(self) -> OwnPool:
        """What computes."""
        computer = self.service.jobs.computer
        assert isinstance(computer, OwnPool)
        return computer

    async def prefill(self, ids: Sequence[int] = (), **fields: Any) -> prefill_pb2.PrefillChunkResponse:
        """PrefillChunk of token ids (or of what ``fields`` say)."""
        return await self.stub.PrefillChunk(message(ids, **fields), timeout=DEADLINE_S)

    async def refused(self, ids: Sequence[int] = (), **fields: Any) -> tuple[StatusCode, str]:
        """The status that a PrefillChunk is refused with."""
        return await refusal(self.prefill(ids, **fields))

    def check_idle(self) -> None:
        """Nothing is held and every page is accounted for."""
        computer = self.computer
        assert computer.publisher.flush(DEADLINE_S)
        computer.device._thread.submit(lambda: None).result(DEADLINE_S)  # what was posted has run
        residents = computer.residents
        residents.check_integrity()
        assert residents.held == 0
        assert self.service.jobs.queue.jobs == 0

    def value(self, name: str, **labels: Any) -> float:
        """A metric's value now."""
        found = self.service.registry.get_sample_value(name, {"model_name": "tiny", **labels})
        assert found is not None, name
        return found


def message(ids: Sequence[int] = (), **fields: Any) -> prefill_pb2.PrefillChunkRequest:
    if ids:
        fields["token_ids"] = chunks_pb2.TokenIds(ids=ids)
    fields.setdefault("durable", True)  # what follows looks into the store
    return prefill_pb2.PrefillChunkRequest(**fields)


async def refusal(call: Awaitable[Any]) -> tuple[StatusCode, str]:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    return caught.value.code(), caught.value.details() or ""


def load_tiny(folder: Path) -> Loaded:
    return load(ServiceOptions(model=str(folder), store="", model_name="tiny"))


@asynccontextmanager
async def worker(loaded: Loaded, store: Path, *, token_file: Path | None = None, **told: Any) -> AsyncIterator[Worker]:
    """A service on ``store``, drained at the end; ``told`` are more of its options."""
    options = PrefillOptions(model="", store=f"file://{store}", token_file=token_file, **told)
    service = build(options, loaded)
    server = RpcServer(Access.from_file(token_file), [FULL_NAME])
    port = await server.start("127.0.0.1", 0)
    await service.start()
    await server.open(service.add_to)
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        running = Worker(service, server, port, prefill_pb2_grpc.PrefillServiceStub(channel))
        try:
            yield running
            running.check_idle()
        finally:
            await server.drain(5.0)
            await service.stop()


def run(body: Callable[[], Awaitable[None]]) -> None:
    """Runs a test's coroutine with a deadline."""
    asyncio.run(asyncio.wait_for(body(), 60))
