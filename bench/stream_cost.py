"""What a token costs the host: the decode service over a device that is a clock, beside a bare ``grpc.aio`` server.

    python -m bench.stream_cost [--streams N ...] [--tokens N] [--step-ms MS] [--profile] [--switch-ms MS ...]

Server and client are processes of their own. The bare server streams as many messages of the same size, made before:
what Python's gRPC takes by itself on this machine. Processor time is the server's, by thread, from /proc. With
``--step-ms`` steps take that long on the "device", without the interpreter: what counts then is how late the device
thread wakes, and how long the device waits for the host.
"""

from __future__ import annotations

import argparse
import asyncio
import cProfile
import io
import multiprocessing
import pstats
import statistics
import sys
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc

from bench.models import fable
from bench.stream_runner import Lateness, clock_service
from decode_service.__main__ import FULL_NAME
from protos import chunks_pb2, decode_pb2
from serving.process.life import SWITCH_INTERVAL_S
from serving.rpc.access import Access
from serving.rpc.channel import Target
from serving.rpc.server import RpcServer

METHOD = f"/{FULL_NAME}/Generate"
PROFILE_LINES = 32


def thread_seconds() -> dict[str, float]:
    """Processor seconds of this process's threads so far, by what they are."""
    names = {thread.native_id: thread.name for thread in threading.enumerate()}
    spent: dict[str, float] = defaultdict(float)
    for task in Path("/proc/self/task").iterdir():
        name = names.get(int(task.name), "gRPC and others")
        if "_poll_wrapper" in name:
            name = "gRPC's poller"
        spent[name] += int((task / "schedstat").read_text().split()[0]) / 1e9
    return dict(spent)


async def answer_commands(pipe: Any, commands: dict[str, Callable[[], Any]]) -> None:
    """Until "stop"; what is asked is done in the event loop."""
    while (name := await asyncio.to_thread(pipe.recv)) != "stop":
        pipe.send(commands[name]())


def profiled(profiles: list[cProfile.Profile]) -> str:
    for profile in profiles:
        profile.disable()
    text = io.StringIO()
    pstats.Stats(*profiles, stream=text).sort_stats("tottime").print_stats(PROFILE_LINES)
    return text.getvalue()


async def serve_clock(pipe: Any, options: argparse.Namespace) -> None:
    """The decode service."""
    with tempfile.TemporaryDirectory() as store:
        service, runner = clock_service(f"file://{store}", options.batch, options.step_ms / 1e3, options.launches)
        server = RpcServer(Access(), [FULL_NAME])
        port = await server.start("127.0.0.1", 0)
        await service.start()
        sys.setswitchinterval(options.switch_ms / 1e3 or SWITCH_INTERVAL_S)
        await server.open(service.add_to)
        profiles: list[cProfile.Profile] = []

        def enable() -> None:
            profile = cProfile.Profile(time.thread_time)
            profiles.append(profile)
            profile.enable()

        def take_lateness() -> Lateness:
            taken, runner.lateness = runner.lateness, Lateness()
            return taken

        pipe.send(port)
        commands = {"spent": thread_seconds, "lateness": take_lateness}
        commands |= {"profile": enable, "profile device": lambda: service.worker.call(enable)}
        commands |= {"profiled": lambda: profiled(profiles[:1]), "profiled device": lambda: profiled(profiles[1:])}
        await answer_commands(pipe, commands)
        await server.drain(0.0)
        await service.stop()


async def serve_bare(pipe: Any, options: argparse.Namespace) -> None:
    """Streams messages that are made already; once a step if steps take time."""
    message = decode_pb2.GenerateResponse(delta=decode_pb2.Delta(text=" word", token_ids=[1234])).SerializeToString()
    step = asyncio.Event()

    async def generate(_: Any, context: Any) -> None:
        for _token in range(options.tokens):
            if options.step_ms:
                await step.wait()
            await context.write(message)

    async def steps() -> None:
        while True:
            await asyncio.sleep(options.step_ms / 1e3)
            step.set()
            step.clear()

    server = grpc.aio.server()
    handler = grpc.unary_stream_rpc_method_handler(generate)
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(FULL_NAME, {"Generate": handler}),))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    clock = asyncio.create_task(steps()) if options.step_ms else None
    pipe.send(port)
    await answer_commands(pipe, {"spent": thread_seconds})
    if clock is not None:
        clock.cancel()
    await server.stop(None)


SERVERS = {"decode service": serve_clock, "bare grpc.aio": serve_bare}


def run_server(kind: str, pipe: Any, options: argparse.Namespace) -> None:
    asyncio.run(SERVERS[kind](pipe, options))


@contextmanager
def server(kind: str, options: argparse.Namespace) -> Iterator[tuple[Callable[[str], Any], int]]:
    """A way to ask it, and its port."""
    processes = multiprocessing.get_context("spawn")
    here, there = processes.Pipe()
    child = processes.Process(target=run_server, args=(kind, there, options))
    child.start()

    def ask(command: str) -> Any:
        here.send(command)
        return here.recv()

    try:
        yield ask, here.recv()
    finally:
        here.send("stop")
        child.join(30)


def request(tokens: int, seed: int) -> bytes:
    query = decode_pb2.Segment(token_ids=chunks_pb2.TokenIds(ids=fable().prompt(16, seed)))
    sampling = decode_pb2.SamplingParams(max_tokens=tokens, ignore_eos=True)
    return decode_pb2.GenerateRequest(segments=[query], sampling=sampling).SerializeToString()


async def stream(channel: Any, message: bytes) -> tuple[int, float, float]:
    """Messages, and when the first and the last came. They are not parsed: that is the client's affair."""
    call: AsyncIterator[bytes] = channel.unary_stream(METHOD)(message)
    count, first, last = 0, 0.0, 0.0
    async for _ in call:
        count += 1
        last = time.monotonic()
        first = first or last
    return count, first, last


async def load(port: int, options: argparse.Namespace, streams: int) -> tuple[int, float]:
    """Messages and seconds of so many streams at once."""
    async with Target(f"127.0.0.1:{port}").open_async() as channel:
        await channel.channel_ready()
        messages = [request(options.tokens, seed) for seed in range(streams)]
        done = await asyncio.gather(*(stream(channel, message) for message in messages))
    return sum(count for count, _, _ in done), max(end for _, _, end in done) - min(first for _, first, _ in done)


def measure(kind: str, options: argparse.Namespace, streams: int) -> float:
    """Prints a row; microseconds of processor time a token."""
    with server(kind, options) as (ask, port):
        asyncio.run(load(port, argparse.Namespace(tokens=64), streams))  # warms up
        if kind == "decode service":
            ask("lateness")
            if options.profile:
                ask("profile"), ask("profile device")
        before = ask("spent")
        messages, seconds = asyncio.run(load(port, options, streams))
        after = ask("spent")
        tokens = streams * options.tokens
        spent = {name: (after[name] - before.get(name, 0.0)) / tokens * 1e6 for name in after}
        rows = ", ".join(f"{name} {us:.1f}" for name, us in sorted(spent.items(), key=lambda row: -row[1]) if us > 0.5)
        total = sum(spent.values())
        print(
            f"{kind:14} {streams:4} streams: {tokens / seconds:7.0f} tokens/s, {messages / tokens:.2f} messages a "
            f"token, {total:6.1f} us a token ({rows})",
            flush=True,
        )
        if kind == "decode service":
            report_lateness(ask("lateness"))
            if options.profile:
                print("event loop\n", ask("profiled"), "\ndevice thread\n", ask("profiled device"))
    return total


def report_lateness(found: Lateness) -> None:
    if len(found.late_s) < 20:
        return
    cuts = statistics.quantiles(found.late_s, n=100)
    print(
        f"    device thread wakes late by p50 {cuts[49] * 1e3:.2f}, p99 {cuts[98] * 1e3:.2f}, max "
        f"{max(found.late_s) * 1e3:.2f} ms; the device waits {found.idle_s / (found.idle_s + found.busy_s):.1%}",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--streams", type=int, nargs="*", default=[16, 64, 128])
    parser.add_argument("--tokens", type=int, default=1000, help="of each stream")
    parser.add_argument("--step-ms", type=float, default=0.0, help="how long a step takes; 0: no time")
    parser.add_argument("--launches", type=int, default=16, help="calls of torch with which a step begins")
    parser.add_argument("--switch-ms", type=float, nargs="*", default=[0.0], help="switch intervals; 0: the service's")
    parser.add_argument("--profile", action="store_true", help="what functions take, in both threads (slows all down)")
    args = parser.parse_args()
    for streams in args.streams:
        floor = 0.0
        for kind in reversed(SERVERS):
            for switch_ms in args.switch_ms if kind == "decode service" else [0.0]:
                options = argparse.Namespace(**{**vars(args), "batch": streams, "switch_ms": switch_ms})
                total = measure(kind, options, streams)
                floor = floor or total
                if kind == "decode service":
                    print(f"    switch interval {switch_ms or 'as it is'}: {total / floor:.2f} of the bare server")


if __name__ == "__main__":
    main()
