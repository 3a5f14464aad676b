"""How long the worst requests delay somebody else's health check.

    python -m bench.limits --model models/fable

Starts both services, sends each request in turn, many times side by side, and asks for health over a connection of its
own all the while. Prints, for each kind, its bytes, its status, and the checks' median and longest time in ms.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from protos import chunks_pb2, decode_pb2, decode_pb2_grpc, prefill_pb2
from serving.rpc.channel import Target
from serving.rpc.field_bounds import LABEL_CHARACTERS_MAX
from serving.rpc.parsing import message_nbytes_max, text_nbytes_max

Segment, TokenIds = decode_pb2.Segment, chunks_pb2.TokenIds
EXPLAIN, GENERATE = "/cairn.v1.DecodeService/Explain", "/cairn.v1.DecodeService/Generate"
PREFILL, GET = "/cairn.v1.PrefillService/PrefillChunk", "/cairn.v1.PrefillService/GetChunk"
TOGETHER = 4
PAUSE_S = 0.002


def requests(context: int) -> Iterator[tuple[str, str, bytes]]:
    """(name, method, message): what is accepted or refused only late, then what was a hang once."""
    label, text = "n" * LABEL_CHARACTERS_MAX, text_nbytes_max(context)
    few, each = min(1023, context - 1), max(1, (context - 1) // 1024)

    def request(*segments: decode_pb2.Segment, **fields: Any) -> bytes:
        return decode_pb2.GenerateRequest(segments=segments, **fields).SerializeToString()

    def prefill(**fields: Any) -> bytes:
        return prefill_pb2.PrefillChunkRequest(**fields).SerializeToString()

    yield "token ids, one segment", EXPLAIN, request(Segment(token_ids=TokenIds(ids=[5] * context)))
    yield "token ids, 1024 segments", EXPLAIN, request(*[Segment(token_ids=TokenIds(ids=[5] * each))] * (few + 1))
    yield "text of words", EXPLAIN, request(Segment(text=("the quick brown fox " * text)[:text]))
    yield "text of one letter", EXPLAIN, request(Segment(text="a" * text))
    yield "text of two-byte letters", EXPLAIN, request(Segment(text="é" * (text // 2)))
    yield "1024 texts with roles", EXPLAIN, request(*[Segment(text="word", role="user")] * (few + 1))
    yield "1024 ids of no chunk", EXPLAIN, request(*[Segment(chunk_id="f" * 64)] * (few + 1))
    stops = decode_pb2.SamplingParams(stop=["a" * 255 + "b"] * 16, stop_token_ids=list(range(4096)), max_tokens=64)
    yield "stops", GENERATE, request(Segment(token_ids=TokenIds(ids=[5])), sampling=stops)
    yield "tags and names", PREFILL, prefill(text="x", tags=[label] * 64, name=label, role="user")
    yield "1024 context chunks", PREFILL, prefill(text="x", context_chunk_ids=["f" * 64] * 1024)
    yield "text of a chunk", PREFILL, prefill(text="a" * text)
    most = message_nbytes_max(context) - 16
    yield "empty segments", EXPLAIN, b"\x12\x00" * (most // 2)
    yield "tags", PREFILL, b"\x42\x00" * (most // 2)
    yield "a long id", GET, prefill_pb2.GetChunkRequest(chunk_id="x" * (most - 8)).SerializeToString()
    yield "4 MB of empty segments", EXPLAIN, b"\x12\x00" * (2 << 20)
    yield "16 MB of text", EXPLAIN, request(Segment(text="x" * (16_000_000)))


class Checks:
    """Asks for health over a connection of its own while the block runs; ``ms`` are the times."""

    def __init__(self, address: str) -> None:
        self.ms: list[float] = []
        self._address = address
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run)

    def __enter__(self) -> Checks:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()

    def _run(self) -> None:
        with Target(self._address).open() as channel:
            stub = health_pb2_grpc.HealthStub(channel)
            stub.Check(health_pb2.HealthCheckRequest())
            while not self._ended.wait(PAUSE_S):
                began = time.perf_counter()
                stub.Check(health_pb2.HealthCheckRequest(), timeout=60)
                self.ms.append((time.perf_counter() - began) * 1e3)


def send(address: str, method: str, raw: bytes) -> str:
    """The status that the request ends with."""
    with grpc.insecure_channel(address, [("grpc.max_send_message_length", -1)]) as channel:
        try:
            if method == GENERATE:
                list(channel.unary_stream(method, None, None)(raw, timeout=30))
            else:
                channel.unary_unary(method, None, None)(raw, timeout=30)
        except grpc.RpcError as error:
            return str(error.code().name)
    return "OK"


def measure(prefill: str, decode: str) -> None:
    with Target(decode).open() as channel:
        context = decode_pb2_grpc.DecodeServiceStub(channel).GetLoads(decode_pb2.GetLoadsRequest()).context_length_max
    print(f"context of {context} tokens, messages of at most {message_nbytes_max(context)} bytes, {TOGETHER} at once")
    print(f"{'request':28} {'bytes':>9} {'status':20} {'s':>6} {'median':>7} {'max ms':>7}")
    for name, method, raw in requests(context):
        address = prefill if "Prefill" in method else decode
        with Checks(address) as checks, ThreadPoolExecutor(TOGETHER) as senders:
            time.sleep(0.2)
            began = time.perf_counter()
            statuses = set(senders.map(partial(send, address, method), [raw] * TOGETHER))
            took = time.perf_counter() - began
        median, most = statistics.median(checks.ms), max(checks.ms)
        print(
            f"{name:28} {len(raw):9} {'/'.join(sorted(statuses)):20} {took:6.2f} {median:7.1f} {most:7.1f}", flush=True
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="models/fable")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as store:
        argv = [sys.executable, "-m", "cairn.cli", "up", "--json", "--model", args.model, "--store", f"file://{store}"]
        ports = [f"--{service}{kind}" for service in ("prefill", "decode") for kind in ("-port", "-metrics-port")]
        for port in ports:
            argv += [port, "0"]
        up = subprocess.Popen([*argv, "--log-level", "error"], stdout=subprocess.PIPE, text=True)
        try:
            assert up.stdout is not None
            ready = json.loads(up.stdout.readline())
            measure(ready["prefill"]["address"], ready["decode"]["address"])
        finally:
            up.terminate()
            up.wait(60)


if __name__ == "__main__":
    main()
