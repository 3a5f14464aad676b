"""Time to first token through the real services: cold, warm (resident), warm (from the store), and plain generate.

decode A   document 1..N for the first time  -> cold (prefill service computes, store, load)
           the same documents again          -> warm, resident
decode B   the same documents, first time    -> warm, from the store
"""

from __future__ import annotations

import asyncio
import contextlib
import statistics
import tempfile
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, replace
from typing import Any

import torch

from bench.models import BenchModel
from cairn.client.async_client import AsyncClient
from cairn.local.processes import Processes
from cairn.local.services import service_commands
from decode_service.options import DecodeOptions
from prefill_service.options import PrefillOptions

QUERY_TOKENS = 8


@dataclass(frozen=True)
class FirstTokens:
    """Medians in milliseconds of wall time, as the client sees them."""

    cold_ms: float
    resident_ms: float
    store_ms: float


async def ours(model: BenchModel, tokens: int, documents: int, threads: int) -> FirstTokens:
    """Runs the three cases over ``documents`` documents of ``tokens`` tokens."""
    texts = [model.prompt(tokens, seed) for seed in range(documents)]
    with tempfile.TemporaryDirectory(prefix="cairn-bench-") as folder:
        pages = documents * (tokens // 16 + 1) * 2 + 64
        shared = {
            **{"model": str(model.path), "store": f"file://{folder}", "dtype": model.dtype},
            **{"threads": threads, "kv_pages": pages},
        }
        async with _services(shared) as (first, second):
            await _ask(first, model.prompt(64, 999), model)  # both are warm machines, not warm caches
            await _ask(second, model.prompt(64, 998), model)
            cold = [await _ask(first, text, model) for text in texts]
            resident = [await _ask(first, text, model) for text in texts]
            store = [await _ask(second, text, model) for text in texts]
    return FirstTokens(*(statistics.median(times) * 1e3 for times in (cold, resident, store)))


@contextlib.asynccontextmanager
async def _services(shared: dict[str, Any]) -> AsyncIterator[tuple[AsyncClient, AsyncClient]]:
    """One prefill and two decode services on one store, and a client of each decode service."""
    told = PrefillOptions(**shared), DecodeOptions(**shared, prefill="")
    prefill, decode = service_commands(*told)
    _, other = service_commands(replace(told[0], port=int(prefill.address.rpartition(":")[2])), told[1])
    processes = Processes(lambda service, line: None)
    try:
        await processes.start([prefill, decode, replace(other, name="decode-2")])
        await processes.wait_ready(300.0)
        async with (
            AsyncClient(prefill=prefill.address, decode=decode.address) as first,
            AsyncClient(prefill=prefill.address, decode=other.address) as second,
        ):
            yield first, second
    finally:
        await processes.stop(10.0)


async def _ask(client: AsyncClient, document: list[int], model: BenchModel) -> float:
    """Seconds from the call to the first token of a one-token answer."""
    started = time.perf_counter()
    async for _ in client.generate([document, model.prompt(QUERY_TOKENS, 7)], max_tokens=1, ignore_eos=True):
        return time.perf_counter() - started
    raise RuntimeError("the answer had no token")


@torch.inference_mode()
def theirs(model: BenchModel, module: Any, tokens: int, runs: int) -> float:
    """Milliseconds that transformers' ``generate`` takes to the first token; it keeps nothing between calls."""
    module.set_attn_implementation("sdpa")
    times: list[float] = []
    for seed in range(runs):
        ids = torch.tensor([model.prompt(tokens, seed) + model.prompt(QUERY_TOKENS, 7)])
        started = time.perf_counter()
        module.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=1, do_sample=False, pad_token_id=0)
        times.append(time.perf_counter() - started)
    return statistics.median(times) * 1e3


def measure(model: BenchModel, tokens: int, documents: int, threads: int) -> FirstTokens:
    """``ours`` from ordinary code."""
    return asyncio.run(ours(model, tokens, documents, threads))
