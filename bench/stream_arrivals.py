"""What a request costs before the scheduler has it: many arrive at once over one registered chunk of 32k tokens.

    python -m bench.stream_arrivals [--requests N] [--chunk TOKENS] [--store URL] [--inline]

The decode service over a device that is a clock, in a process of its own; the chunk is resident. Times are from the
arrival of a call in Python to its sequence in the scheduler's inbox; processor time is the server's, by thread, until
the last one is there. The device thread takes nothing before that. "Nothing remembered": content is read and keyed
anew.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import cProfile
import multiprocessing
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc

from bench.models import fable
from bench.stream_cost import METHOD, answer_commands, profiled, thread_seconds
from bench.stream_runner import clock_service
from chunk_store.key import ChunkId, ChunkType, chunk_id
from chunk_store.record import ChunkRecord
from decode_service.__main__ import FULL_NAME
from decode_service.api.service import DecodeService
from decode_service.device.worker import DecodeWorker
from decode_service.prompt.memory import KeyMemory, RecordMemory
from decode_service.scheduling.sequence import Sequence
from engine.reuse import ReuseMode, key_composition
from protos import chunks_pb2, decode_pb2
from serving.process.life import SWITCH_INTERVAL_S
from serving.rpc.access import Access
from serving.rpc.channel import Target
from serving.rpc.server import RpcServer

ROUNDS = 8  # the first warms up
MESSAGES = 2  # to each request: its one token, and the completion


def document(tokens: int) -> tuple[int, ...]:
    return tuple(fable().prompt(tokens, 1))


def register(service: DecodeService, token_ids: tuple[int, ...]) -> ChunkId:
    """The chunk, registered, and its KV resident."""
    resolver, residents = service.resolver, service.worker.residents
    name = chunk_id(resolver.codec.identity, ChunkType.CONTEXT, token_ids)
    resolver.store.put_records([ChunkRecord(name, resolver.codec.identity, ChunkType.CONTEXT, token_ids)])
    keyed = key_composition(resolver.served.identity, [token_ids], ReuseMode.EXACT)[0]
    chunk = residents.reserve(keyed.key, len(token_ids))
    chunk.ready = True
    return name


@dataclass
class Burst:
    """When each request came to Python and when it was in the scheduler's inbox, in ns; processor seconds by thread
    before the first came and when the last one was there."""

    spans: list[tuple[int, int]] = field(default_factory=list)
    before: dict[str, float] = field(default_factory=dict)
    after: dict[str, float] = field(default_factory=dict)


class Line:
    """Holds the device thread until all requests of a burst are in its inbox: nothing else is done meanwhile."""

    def __init__(self, worker: DecodeWorker, requests: int) -> None:
        self._worker = worker
        self._requests = requests
        self._submit = worker.submit
        self._full = threading.Event()
        self.last = Burst()
        worker.submit = self._noted  # type: ignore[method-assign]

    def hold(self) -> None:
        self._full.clear()
        self._worker.call(lambda: (self._full.wait(60.0), None)[1])
        self.last = Burst(before=thread_seconds())

    def _noted(self, *sequences: Sequence) -> None:
        self._submit(*sequences)
        self.last.spans += [(sequence.clock.arrived, time.monotonic_ns()) for sequence in sequences]
        if len(self.last.spans) == self._requests:
            self.last.after = thread_seconds()
            self._full.set()


async def serve(pipe: Any, options: argparse.Namespace) -> None:
    with tempfile.TemporaryDirectory() as store:
        url = options.store or f"file://{Path(store)}"
        service, _ = clock_service(url, options.requests, 0.0, 0)
        name = register(service, document(options.chunk))
        if options.forgets:
            service.resolver._records, service.resolver._keys = RecordMemory(0), KeyMemory(0)
        line = Line(service.worker, options.requests)
        server = RpcServer(Access(), [FULL_NAME])
        port = await server.start("127.0.0.1", 0)
        await service.start()
        sys.setswitchinterval(options.switch_ms / 1e3 or SWITCH_INTERVAL_S)
        await server.open(service.add_to)
        pipe.send((port, name))
        profile = cProfile.Profile(time.thread_time)
        commands: dict[str, Callable[[], Any]] = {"hold": line.hold, "burst": lambda: line.last}
        commands |= {"profile": profile.enable, "profiled": lambda: profiled([profile])}
        await answer_commands(pipe, commands)
        await server.drain(0.0)
        await service.stop()


async def serve_bare(pipe: Any, options: argparse.Namespace) -> None:
    """As many messages to each call, made before, and nothing else."""
    reply = decode_pb2.GenerateResponse(delta=decode_pb2.Delta(text=" word", token_ids=[1234])).SerializeToString()

    async def generate(_: Any, context: Any) -> None:
        for _ in range(MESSAGES):
            await context.write(reply)

    bare = grpc.aio.server()
    handler = grpc.unary_stream_rpc_method_handler(generate)
    bare.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(FULL_NAME, {"Generate": handler}),))
    port = bare.add_insecure_port("127.0.0.1:0")
    await bare.start()
    pipe.send((port, ""))
    await answer_commands(pipe, {"spent": thread_seconds})
    await bare.stop(None)


def run_server(pipe: Any, options: argparse.Namespace) -> None:
    asyncio.run(serve_bare(pipe, options) if options.bare else serve(pipe, options))


@contextlib.contextmanager
def server(options: argparse.Namespace) -> Iterator[tuple[Callable[[str], Any], int, str]]:
    processes = multiprocessing.get_context("spawn")
    here, there = processes.Pipe()
    child = processes.Process(target=run_server, args=(there, options))
    child.start()

    def ask(command: str) -> Any:
        here.send(command)
        return here.recv()

    try:
        yield ask, *here.recv()
    finally:
        here.send("stop")
        child.join(30)


def request(chunk: decode_pb2.Segment, seed: int) -> bytes:
    query = decode_pb2.Segment(token_ids=chunks_pb2.TokenIds(ids=fable().prompt(64, seed)))
    sampling = decode_pb2.SamplingParams(max_tokens=1, ignore_eos=True)
    return decode_pb2.GenerateRequest(segments=[chunk, query], sampling=sampling).SerializeToString()


async def drain(channel: Any, message: bytes) -> None:
    async for _ in channel.unary_stream(METHOD)(message):
        pass


async def burst(port: int, messages: list[bytes]) -> None:
    async with Target(f"127.0.0.1:{port}").open_async() as channel:
        await channel.channel_ready()
        await asyncio.gather(*(drain(channel, message) for message in messages))


def rows_of(spent: Mapping[str, float], requests: int) -> str:
    """Milliseconds a request, by thread."""
    each = {("threads" if name.startswith("asyncio") else name): 0.0 for name in spent}
    for name, seconds in spent.items():
        each["threads" if name.startswith("asyncio") else name] += seconds / requests * 1e3
    rows = ", ".join(f"{name} {ms:.2f}" for name, ms in sorted(each.items(), key=lambda row: -row[1]) if ms > 0.02)
    return f"{sum(each.values()):.2f} ms a request ({rows})"


def measure_bare(options: argparse.Namespace) -> None:
    with server(options) as (ask, port, _):
        messages = [request(decode_pb2.Segment(chunk_id="0" * 64), seed) for seed in range(options.requests)]
        asyncio.run(burst(port, messages))
        before = ask("spent")
        for _ in range(ROUNDS):
            asyncio.run(burst(port, messages))
        after = ask("spent")
    spent = {name: after[name] - before.get(name, 0.0) for name in after}
    print(f"a bare server, which also answers: processor {rows_of(spent, ROUNDS * options.requests)}", flush=True)


def measure(options: argparse.Namespace) -> None:
    """Prints what it takes to bring the requests of a burst into the scheduler's inbox: the median of all bursts."""
    with server(options) as (ask, port, name):
        inline = decode_pb2.Segment(token_ids=chunks_pb2.TokenIds(ids=document(options.chunk)))
        chunk = inline if options.inline else decode_pb2.Segment(chunk_id=name)
        messages = [request(chunk, seed) for seed in range(options.requests)]
        bursts: list[Burst] = []
        for number in range(ROUNDS + 1):
            ask("hold")
            asyncio.run(burst(port, messages))
            bursts += [ask("burst")] * (number > 0)  # the first warms up
            if options.profile and number == 0:
                ask("profile")
        if options.profile:
            print(ask("profiled"))
    walls = sorted((max(end for _, end in b.spans) - min(begin for begin, _ in b.spans)) / 1e6 for b in bursts)
    totals = [sum(b.after.values()) - sum(b.before.get(name, 0.0) for name in b.after) for b in bursts]
    usual = bursts[totals.index(statistics.median_low(totals))]
    cuts = statistics.quantiles([(end - begin) / 1e6 for b in bursts for begin, end in b.spans], n=100)
    spent = {name: usual.after[name] - usual.before.get(name, 0.0) for name in usual.after}
    how = (", sent with each" if options.inline else "") + (", nothing remembered" if options.forgets else "")
    print(f"over a chunk of {options.chunk} tokens{how}:")
    print(f"    all in the inbox after {statistics.median(walls):.1f} ms ({walls[0]:.1f} to {walls[-1]:.1f})")
    print(f"    one after p50 {cuts[49]:.1f}, p99 {cuts[98]:.1f} ms")
    print(f"    processor {rows_of(spent, options.requests)}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=64, help="at once")
    parser.add_argument("--chunk", type=int, default=32768, help="tokens")
    parser.add_argument("--store", default="", help="URL; a directory of its own without it")
    parser.add_argument("--inline", action="store_true", help="send the chunk's tokens with every request")
    parser.add_argument("--switch-ms", type=float, default=0.0, help="the switch interval; 0: the service's")
    parser.add_argument("--profile", action="store_true", help="what functions take in the event loop")
    options = parser.parse_args()
    print(f"{options.requests} requests at once")
    measure_bare(argparse.Namespace(**vars(options), bare=True))
    for forgets in (True, False):
        measure(argparse.Namespace(**vars(options), bare=False, forgets=forgets))


if __name__ == "__main__":
    main()
