"""A load generator for token streams: opens many at once over gRPC and notes when each token came.

    python -m bench.stream_load HOST:PORT < requests.json > times.json

h2load and its kind do not know grpc-status or streams of tokens. Runs in a process of its own, so that it does not
share an interpreter with what it measures.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from typing import Any

from protos import chunks_pb2, decode_pb2, decode_pb2_grpc
from serving.rpc.channel import Target

DEADLINE_S = 300.0


def request_of(spec: dict[str, Any]) -> decode_pb2.GenerateRequest:
    """``chunks`` (ids), ``query`` (token ids) and ``max_tokens``."""
    segments = [decode_pb2.Segment(chunk_id=chunk_id) for chunk_id in spec["chunks"]]
    segments.append(decode_pb2.Segment(token_ids=chunks_pb2.TokenIds(ids=spec["query"])))
    sampling = decode_pb2.SamplingParams(max_tokens=spec["max_tokens"], ignore_eos=True)
    mode = chunks_pb2.REUSE_MODE_EXACT
    return decode_pb2.GenerateRequest(segments=segments, sampling=sampling, reuse_mode=mode)


async def stream(stub: Any, spec: dict[str, Any]) -> list[tuple[float, int]]:
    """(seconds, tokens) of every delta, by the monotonic clock."""
    arrived: list[tuple[float, int]] = []
    async for event in stub.Generate(request_of(spec), timeout=DEADLINE_S):
        if event.WhichOneof("event") == "delta" and event.delta.token_ids:
            arrived.append((time.monotonic(), len(event.delta.token_ids)))
    return arrived


async def run(address: str, specs: list[dict[str, Any]]) -> list[list[tuple[float, int]]]:
    async with Target(address).open_async() as channel:
        stub = decode_pb2_grpc.DecodeServiceStub(channel)
        return list(await asyncio.gather(*(stream(stub, spec) for spec in specs)))


def step_ms(streams: list[list[tuple[float, int]]]) -> float:
    """Milliseconds a token of each stream, over the time in which all streams were running."""
    begin = max(arrived[0][0] for arrived in streams)
    end = min(arrived[-1][0] for arrived in streams)
    tokens = sum(count for arrived in streams for at, count in arrived if begin < at <= end)
    return (end - begin) / (tokens / len(streams)) * 1e3


if __name__ == "__main__":
    print(json.dumps(asyncio.run(run(sys.argv[1], json.load(sys.stdin)))))
