"""Time to first token through the real services: cold, warm (resident), warm (from the store), and plain generate.

decode A   document 1..N for the first time  -> cold (prefill service computes; handed over or stored and loaded)
           the same documents again          -> warm, resident
decode B   the same documents, first time    -> warm, from the store

Cold and plain alternate, for the machine may be shared; of both the fastest stands beside the median.
"""

from __future__ import annotations

import asyncio
import contextlib
import statistics
import tempfile
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch

from bench.models import BenchModel
from cairn.client.async_client import AsyncClient
from cairn.client.reports import Timings
from cairn.local.processes import Processes
from cairn.local.services import service_commands
from decode_service.options import DecodeOptions
from prefill_service.options import PrefillOptions

QUERY_TOKENS = 8


@dataclass(frozen=True)
class FirstTokens:
    """Milliseconds of wall time, as the client sees them: medians, and of cold and plain the fastest.

    ``cold_of_plain`` is the median of the pairs' ratios, ``stages_ms`` where the decode service says a cold one went.
    """

    cold_ms: float
    resident_ms: float
    store_ms: float
    plain_ms: float
    cold_of_plain: float
    fastest_cold_ms: float
    fastest_plain_ms: float
    stages_ms: dict[str, float]


async def ours(
    model: BenchModel, tokens: int, documents: int, threads: int, plain: Callable[[list[int]], float]
) -> FirstTokens:
    """Runs the cases over ``documents`` documents of ``tokens`` tokens; ``plain`` says how many seconds it took."""
    texts = [model.prompt(tokens, seed) for seed in range(documents)]
    with tempfile.TemporaryDirectory(prefix="cairn-bench-") as folder:
        pages = documents * (tokens // 16 + 1) * 2 + 64
        shared = {
            **{"model": str(model.path), "store": f"file://{folder}", "dtype": model.dtype},
            **{"threads": threads, "kv_pages": pages},
        }
        async with _services(shared) as (first, second):
            for seed in (997, 998, 999):  # all are warm machines, not warm caches
                for ask in (first, second):
                    await _ask(ask, model.prompt(64, seed), model)
            await asyncio.to_thread(plain, model.prompt(tokens, 996))
            pairs = []
            for text in texts:
                cold = await _ask(first, text, model)
                pairs.append((cold, await asyncio.to_thread(plain, text + model.prompt(QUERY_TOKENS, 7))))
            resident = [(await _ask(first, text, model)).first_s for text in texts]
            store = [(await _ask(second, text, model)).first_s for text in texts]
    cold_s, plain_s = [cold.first_s for cold, _ in pairs], [seconds for _, seconds in pairs]
    names = vars(pairs[0][0].timings)
    stages = {name: statistics.median(getattr(cold.timings, name) for cold, _ in pairs) for name in names}
    return FirstTokens(
        cold_ms=statistics.median(cold_s) * 1e3,
        resident_ms=statistics.median(resident) * 1e3,
        store_ms=statistics.median(store) * 1e3,
        plain_ms=statistics.median(plain_s) * 1e3,
        cold_of_plain=statistics.median(cold / alone for cold, alone in zip(cold_s, plain_s, strict=True)),
        fastest_cold_ms=min(cold_s) * 1e3,
        fastest_plain_ms=min(plain_s) * 1e3,
        stages_ms={name.removesuffix("_s"): round(value * 1e3, 2) for name, value in stages.items() if value},
    )


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


@dataclass(frozen=True)
class _Asked:
    first_s: float
    timings: Timings


async def _ask(client: AsyncClient, document: list[int], model: BenchModel) -> _Asked:
    """Seconds from the call to the first token of a one-token answer, and what the service says of it."""
    started = time.perf_counter()
    stream = client.generate([document, model.prompt(QUERY_TOKENS, 7)], max_tokens=1, ignore_eos=True)
    first_s = 0.0
    async for _ in stream:
        first_s = first_s or time.perf_counter() - started
    if not first_s:
        raise RuntimeError("the answer had no token")
    return _Asked(first_s, stream.result.timings)


@torch.inference_mode()
def generate(module: Any, ids: list[int]) -> float:
    """Seconds that transformers' ``generate`` takes to the first token; it keeps nothing between calls."""
    started = time.perf_counter()
    prompt = torch.tensor([ids])
    module.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=1, do_sample=False, pad_token_id=0)
    return time.perf_counter() - started


def measure(model: BenchModel, module: Any, tokens: int, documents: int, threads: int) -> FirstTokens:
    """``ours`` from ordinary code; ``module`` is the same model."""
    module.set_attn_implementation("sdpa")
    return asyncio.run(ours(model, tokens, documents, threads, partial(generate, module)))
