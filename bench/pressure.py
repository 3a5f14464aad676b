"""The decode service under pressure, from outside: how fast it refuses, and what a long query does to other streams.

Refusing is measured beside a bare ``grpc.aio`` server in a process of its own that ends every call at once: what
Python's gRPC and this load generator take by themselves on this machine.

    python -m bench.pressure [--callers N] [--query TOKENS]

Both services run as processes with the shipped model; what is measured runs in this one, over gRPC.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import multiprocessing
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import grpc

from bench.models import fable
from cairn.local.processes import free_port
from protos import chunks_pb2, decode_pb2, decode_pb2_grpc
from serving.rpc.channel import Target

FLOOD_S = 8.0
STREAMS = 8


@contextmanager
def services(*options: str) -> Iterator[str]:
    """Both services; the decode service's address."""
    ports = [free_port("127.0.0.1") for _ in range(2)]
    with tempfile.TemporaryDirectory() as store:
        shared = ["--model", str(fable().path), "--store", f"file://{store}", "--log-level", "warning"]
        prefill = [sys.executable, "-m", "prefill_service", "--port", str(ports[0]), *shared]
        decode = [sys.executable, "-m", "decode_service", "--port", str(ports[1]), *shared]
        decode += ["--prefill", f"127.0.0.1:{ports[0]}", *options]
        children = [subprocess.Popen(argv, stdout=subprocess.PIPE, text=True) for argv in (prefill, decode)]
        try:
            for child in children:
                assert child.stdout is not None and json.loads(child.stdout.readline())["event"] == "ready"
            yield f"127.0.0.1:{ports[1]}"
        finally:
            for child in reversed(children):
                child.terminate()
            for child in children:
                child.wait(60)


def request(tokens: list[list[int]], max_tokens: int) -> decode_pb2.GenerateRequest:
    segments = [decode_pb2.Segment(token_ids=chunks_pb2.TokenIds(ids=ids)) for ids in tokens]
    sampling = decode_pb2.SamplingParams(max_tokens=max_tokens, ignore_eos=True)
    return decode_pb2.GenerateRequest(segments=segments, sampling=sampling)


async def arrivals(stub: Any, message: decode_pb2.GenerateRequest) -> list[float]:
    """When each token of an answer came."""
    return [time.monotonic() async for event in stub.Generate(message, timeout=300) if event.delta.token_ids]


async def refuse_everything(ready: Any) -> None:
    """A server that does nothing else; ``ready`` is sent its address."""

    async def refuse(_: Any, context: Any) -> None:
        await context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, "full")

    server = grpc.aio.server()
    handler = grpc.unary_stream_rpc_method_handler(refuse)
    service = decode_pb2.DESCRIPTOR.services_by_name["DecodeService"].full_name
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(service, {"Generate": handler}),))
    ready.send(f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}")
    await server.start()
    await server.wait_for_termination()


def serve_bare(ready: Any) -> None:
    asyncio.run(refuse_everything(ready))


@contextmanager
def bare_service() -> Iterator[str]:
    """The address of a server that refuses and does nothing else."""
    processes = multiprocessing.get_context("spawn")
    here, there = processes.Pipe()
    child = processes.Process(target=serve_bare, args=(there,))
    child.start()
    try:
        yield here.recv()
    finally:
        child.terminate()
        child.join(60)


async def flood(address: str, callers: int, streams: int) -> None:
    """Every caller asks again as soon as it is refused, with a document of 1000 tokens, beside so many streams."""
    model, refused = fable(), []
    async with Target(address).open_async() as channel:
        stub = decode_pb2_grpc.DecodeServiceStub(channel)
        busy = [asyncio.create_task(arrivals(stub, request([model.prompt(8, n)], 6000))) for n in range(streams)]
        await asyncio.sleep(1.0)
        ends_at = time.monotonic() + FLOOD_S

        async def caller(number: int) -> None:
            message = request([model.prompt(1000, number), model.prompt(8, number)], 16)
            while time.monotonic() < ends_at:
                asked = time.monotonic()
                try:
                    await arrivals(stub, message)
                except grpc.aio.AioRpcError as error:
                    assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED, error
                    refused.append(time.monotonic() - asked)

        await asyncio.gather(*(caller(number) for number in range(callers)))
        for task in busy:
            task.cancel()
        await asyncio.gather(*busy, return_exceptions=True)
    cuts, what = statistics.quantiles(refused, n=100), "the service" if streams else "a bare server"
    print(
        f"{callers:4} callers, {what}: {len(refused) / FLOOD_S:6.0f} refusals/s, "
        f"p50 {cuts[49] * 1e3:6.1f} ms, p99 {cuts[98] * 1e3:6.1f} ms, max {max(refused) * 1e3:6.1f} ms",
        flush=True,
    )


async def long_query(address: str, tokens: int) -> None:
    """Gaps between the tokens of other streams, before and while a long query is prefilled."""
    model = fable()
    async with Target(address).open_async() as channel:
        stub = decode_pb2_grpc.DecodeServiceStub(channel)
        streams = [asyncio.create_task(arrivals(stub, request([model.prompt(8, n)], 6000))) for n in range(STREAMS)]
        watched = stub.Generate(request([model.prompt(8, 99)], 6000), timeout=300)
        times: list[float] = []

        async def watch() -> None:
            async for event in watched:
                times.extend([time.monotonic()] * bool(event.delta.token_ids))

        task = asyncio.create_task(watch())
        await asyncio.sleep(4.0)
        asked = time.monotonic()
        first = asyncio.create_task(arrivals(stub, request([model.prompt(tokens, 7)], 1)))
        await first
        answered = time.monotonic()
        for each in (*streams, task):
            each.cancel()
        await asyncio.gather(*streams, task, return_exceptions=True)
    gaps = [(end, (end - begin) * 1e3) for begin, end in itertools.pairwise(times)]
    usual = [gap for end, gap in gaps if asked - 2 < end <= asked]
    beside = [gap for end, gap in gaps if asked < end <= answered]
    print(
        f"query of {tokens} tokens beside {STREAMS + 1} streams: first token after {(answered - asked) * 1e3:.0f} ms; "
        f"others' gaps usually {statistics.median(usual):.1f} ms (max {max(usual):.1f}), "
        f"meanwhile median {statistics.median(beside):.1f} ms, max {max(beside):.1f} ms, {len(beside)} gaps",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--callers", type=int, nargs="*", default=[8, 32, 128])
    parser.add_argument("--query", type=int, nargs="*", default=[2000, 6000])
    args = parser.parse_args()
    with services("--batch-max", "4", "--waiting-max", "2") as address:
        for callers in args.callers:
            asyncio.run(flood(address, callers, streams=6))
    with bare_service() as address:
        for callers in args.callers:
            asyncio.run(flood(address, callers, streams=0))
    with services("--batch-max", "32") as address:
        for tokens in args.query:
            asyncio.run(long_query(address, tokens))


if __name__ == "__main__":
    main()
