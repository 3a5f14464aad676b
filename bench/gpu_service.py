"""Decode through the service on one GPU: scheduling, sampling and streams over gRPC to another process.

    python -m bench.gpu_service [--json FILE]

The two batch-64 workloads of ``bench.gpu`` with everything that a real step has. Chunks are registered in a store and
their KV is resident (random: the values do not change the work).
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import grpc
import torch
from prometheus_client import CollectorRegistry

from bench.gpu_model import Engine, make_engine
from bench.gpu_workloads import random_tokens
from bench.stream_load import step_ms
from chunk_store.key import ChunkType, chunk_id
from chunk_store.open import open_store
from chunk_store.record import ChunkRecord
from chunk_store.store import ChunkStore
from decode_service.api.service import DecodeService
from decode_service.device.worker import DecodeWorker
from decode_service.kv_source.fetcher import KVFetcher
from decode_service.metrics import DecodeMetrics
from decode_service.prompt.resolver import Resolver
from engine.kv.resident import ResidentChunks
from engine.reuse import ReuseMode, key_composition
from engine.run.choice import decide
from engine.served import ServedModel
from serving.rpc.access import Access
from text.codec import TextCodec

BATCH = 64
TOKENS = 160
WORKLOADS = {
    "decode 64: 32k shared + 256 own": ([[32768]] * BATCH, 256, 49.5, 8.0),
    "decode 64: tree 2k, 8 x 8k, 512 own": ([[2048, 8192 + i // 8] for i in range(BATCH)], 512, 20.6, 9.5),
}


class _NothingMissing:
    """No prefill service: every chunk is resident."""

    def compute_all(self, *arguments: Any) -> Any:
        raise RuntimeError("a chunk was missing")


def make_service(engine: Engine, store: ChunkStore) -> DecodeService:
    """The decode service over an engine that is there already."""
    refusals = dict.fromkeys(ReuseMode, "")
    pieces, decision = engine.runner.piece_tokens, decide(engine.borrowed, engine.findings)
    served = ServedModel(engine.borrowed, engine.findings, engine.identity, refusals, pieces, decision)
    metrics = DecodeMetrics(CollectorRegistry(), model_name="bench", token_nbytes=served.layout.nbytes(1))
    source = KVFetcher(store, _NothingMissing(), engine.identity, lambda composition: None)
    residents = ResidentChunks(engine.pool)
    worker = DecodeWorker(
        engine.runner, residents, source, metrics, eos_token_ids=frozenset(), batch_max=BATCH, waiting_max=2 * BATCH
    )
    resolver = Resolver(served, TextCodec(None, "bench"), store)
    return DecodeService(
        worker, resolver, Access(), metrics.registry, model_name="bench", request_timeout_s=300.0, close=lambda: None
    )


def register(service: DecodeService, lengths: list[list[int]]) -> list[list[str]]:
    """Registers each composition's chunks (of distinct lengths, so of distinct content) and makes them resident."""
    residents, resolver = service.worker.residents, service.resolver
    named: list[list[str]] = []
    for composition in lengths:
        contents = [tuple(random_tokens(length, length)) for length in composition]
        ids = [chunk_id(resolver.codec.identity, ChunkType.CONTEXT, content) for content in contents]
        records = [
            ChunkRecord(name, resolver.codec.identity, ChunkType.CONTEXT, content)
            for name, content in zip(ids, contents, strict=True)
        ]
        resolver.store.put_records(records)
        for keyed in key_composition(resolver.served.identity, contents, ReuseMode.EXACT):
            if residents.find(keyed.key) is None:
                chunk = residents.reserve(keyed.key, len(keyed.token_ids))
                chunk.ready = True
                residents.release(chunk)
        named.append(list(ids))
    return named


async def measure(service: DecodeService, chunks: list[list[str]], own: int) -> float:
    """Milliseconds a step, as a process on the other side of gRPC sees it."""
    server = grpc.aio.server()
    service.add_to(server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    specs = [
        {"chunks": ids, "query": random_tokens(own - TOKENS // 2, 100 + row), "max_tokens": TOKENS}
        for row, ids in enumerate(chunks)
    ]
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "bench.stream_load", f"127.0.0.1:{port}"),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
    )
    output, _ = await asyncio.wait_for(process.communicate(json.dumps(specs).encode()), 300.0)
    await server.stop(1.0)
    return step_ms(json.loads(output))


async def measure_all(service: DecodeService, named: dict[str, list[list[str]]]) -> dict[str, Any]:
    results = {}
    await service.start()
    for name, (_, own, others, goal) in WORKLOADS.items():
        times = [await measure(service, named[name], own) for _ in range(3)]
        results[name] = {"ms": min(times), "all_ms": times, "others_ms": others, "goal_ms": goal}
        print(f"{name:40s} {min(times):7.2f} ms a step over gRPC  (others {others}, goal {goal})", times, flush=True)
    service.worker.stop()
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, default=None)
    options = parser.parse_args()
    engine = make_engine(pool_tokens=262_144, chunk_share=0.7)
    with tempfile.TemporaryDirectory() as folder:
        store = open_store(f"file://{folder}")
        service = make_service(engine, store)
        named = {name: register(service, lengths) for name, (lengths, *_) in WORKLOADS.items()}
        results = asyncio.run(measure_all(service, named))
    print("peak memory, GB:", round(torch.cuda.max_memory_allocated() / 1e9, 1))
    if options.json:
        options.json.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
