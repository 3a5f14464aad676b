"""Keeps a prefill service busy: chunks that nobody has seen, one after the other, a few asked for at a time."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from random import Random

import grpc

from bench.traces import FIRST_ID
from protos import chunks_pb2, prefill_pb2, prefill_pb2_grpc
from serving.rpc.channel import Target

AT_ONCE = 3  # one is computed, one published, one waits
REQUEST_S = 120.0
PAUSE_S = 0.05  # after a refusal


@dataclass
class Registered:
    """What became of it so far."""

    chunks: int = 0
    refused: dict[str, int] = field(default_factory=dict)


@asynccontextmanager
async def registering(address: str, tokens: int, ids: range, seed: int = 6) -> AsyncIterator[Registered]:
    """While it is entered, chunks of ``tokens`` token ids out of ``ids`` are registered and computed, context-free."""
    random, done = Random(seed), Registered()

    async def register(stub: prefill_pb2_grpc.PrefillServiceAsyncStub) -> None:
        while True:
            content = chunks_pb2.TokenIds(ids=[random.choice(ids) for _ in range(tokens)])
            request = prefill_pb2.PrefillChunkRequest(token_ids=content, reuse_mode=chunks_pb2.REUSE_MODE_INDEPENDENT)
            try:
                await stub.PrefillChunk(request, timeout=REQUEST_S)
                done.chunks += 1
            except grpc.aio.AioRpcError as error:
                name = error.code().name
                done.refused[name] = done.refused.get(name, 0) + 1
                await asyncio.sleep(PAUSE_S)

    async with Target(address).open_async() as channel:
        stub: prefill_pb2_grpc.PrefillServiceAsyncStub = prefill_pb2_grpc.PrefillServiceStub(channel)
        tasks = [asyncio.create_task(register(stub)) for _ in range(AT_ONCE)]
        try:
            yield done
        finally:
            for task in tasks:
                task.cancel()
            results = await asyncio.gather(*tasks, return_exceptions=True)
            broken = [each for each in results if isinstance(each, Exception)]
            if broken:
                raise broken[0]


def ids_within(vocabulary: int) -> range:
    """Token ids that a model of this vocabulary has, special ones left out where there is room."""
    return range(min(FIRST_ID, vocabulary // 2), vocabulary)
