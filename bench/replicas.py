"""``python -m bench.replicas``: what is resident where requests go, for three decode services over one store.

The trace ``rag``, shorter, over one prefill and three decode services: requests sent by the client's own choice, to one
service after the other, and at random. Each run has tokens of its own, so nothing is left of an earlier one. Hits are
the share of prompt tokens whose KV was in the pool or the host memory of the service that answered.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from datetime import date
from pathlib import Path
from random import Random
from typing import Any

from bench.models import fable
from bench.serving_services import START_S, STOP_S, fresh_store, vocabulary_of
from bench.traces import Trace, ids_of, rag
from cairn import AsyncClient, Result, Tokens
from cairn.load.workload import Request
from cairn.local.processes import Command, Processes, free_port

MODES = {"exact": ("exact", "given"), "canonical": ("exact", "canonical"), "independent": ("independent", "given")}
POLICIES = ("ours", "in turn", "at random")
TIMEOUT_S = 300.0


@asynccontextmanager
async def services(count: int, shared: Sequence[str], pages: int, capacity: int) -> AsyncIterator[list[str]]:
    """A prefill and ``count`` decode services; their addresses, the prefill service's first."""
    places = [f"127.0.0.1:{free_port('127.0.0.1')}" for _ in range(count + 1)]
    names = ["prefill", *(f"decode {number}" for number in range(count))]
    commands = []
    for name, place in zip(names, places, strict=True):
        own = ["--store-capacity", str(capacity)] if name == "prefill" else ["--prefill", places[0]]
        if name != "prefill":
            own += ["--kv-pages", str(pages)]
        module = f"{name.split()[0]}_service"
        ports = ["--port", place.rpartition(":")[2], "--metrics-port", str(free_port("127.0.0.1"))]
        commands.append(Command(name, (*_python(module), *ports, *shared, *own), place))
    log: list[str] = []
    processes = Processes(lambda name, line: log.append(f"{name}: {line}"))
    try:
        await processes.start(commands)
        await processes.wait_ready(START_S)
        yield places
    except BaseException:
        print("\n".join(log[-40:]))
        raise
    finally:
        await processes.stop(STOP_S)


def _python(module: str) -> list[str]:
    from sys import executable

    return [executable, "-m", module]


async def run(trace: Trace, choose: Callable[[], AsyncClient], mode: str) -> dict[str, Any]:
    """The trace, ``trace.concurrency`` requests at a time; what is counted begins behind its warm-up."""
    reuse, order = MODES[mode]
    results: list[tuple[int, Result]] = []
    waiting = iter(enumerate(request for (request,) in trace.sessions))
    began = time.monotonic()

    async def place() -> None:
        for number, request in waiting:
            parts = _parts(trace, request)
            stream = choose().generate(parts, reuse=reuse, order=order, max_tokens=request.max_tokens, ignore_eos=True)
            results.append((number, await stream.finish()))

    await asyncio.gather(*(place() for _ in range(trace.concurrency)))
    return figures([result for number, result in results if number >= trace.warm_up], time.monotonic() - began)


def _parts(trace: Trace, request: Request) -> list[Tokens]:
    kinds = ["system_prompt" if n < trace.systems else "rag_result" for n in request.documents]
    chunks = [Tokens(trace.documents[n], type=kind) for n, kind in zip(request.documents, kinds, strict=True)]
    return [*chunks, Tokens(ids_of(request.query))]


def figures(results: Sequence[Result], seconds: float) -> dict[str, Any]:
    """Shares of all prompt tokens by where their KV came from."""
    tokens: Counter[str] = Counter()
    for result in results:
        for segment in result.reuse.segments:
            tokens[segment.source if segment.cached_tokens else "computed"] += segment.cached_tokens
            tokens["computed"] += segment.tokens - segment.cached_tokens
    total = sum(tokens.values())
    shares = {source: round(tokens[source] / total, 3) for source in ("device", "host", "store", "computed")}
    firsts = sorted(result.timings.first_token_s for result in results)
    return {
        "requests": len(results),
        "prompt_tokens": total,
        "hits": round(shares["device"] + shares["host"], 3),
        **shares,
        "ttft_p50_ms": round(firsts[len(firsts) // 2] * 1e3),
        "seconds": round(seconds, 1),
    }


async def measure(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Every mode under every policy."""
    model = fable()
    found = []
    with fresh_store() as (folder, capacity):
        shared = ["--model", str(model.path), "--store", f"file://{folder}/store", "--dtype", model.dtype]
        limits = ["--log-level", "warning"]
        async with services(args.replicas, [*shared, *limits], args.kv_pages, capacity) as places:
            prefill, decodes = places[0], places[1:]
            for number, (mode, policy) in enumerate(itertools.product(args.modes, POLICIES)):
                made = rag(args.scale, args.counts).anew(number).within(vocabulary_of(model.path))
                trace = replace(made, concurrency=args.at_once)
                addresses: list[Any] = [decodes] if policy == "ours" else list(decodes)
                clients = [AsyncClient(prefill, each, timeout_s=TIMEOUT_S) for each in addresses]
                try:
                    found.append({"mode": mode, "policy": policy, **await run(trace, _chooser(policy, clients), mode)})
                finally:
                    await asyncio.gather(*(client.aclose() for client in clients))
                print(json.dumps(found[-1]), flush=True)
    return found


def _chooser(policy: str, clients: Sequence[AsyncClient]) -> Callable[[], AsyncClient]:
    turns, random = itertools.cycle(clients), Random(7)
    return (lambda: random.choice(clients)) if policy == "at random" else (lambda: next(turns))


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--replicas", type=int, default=3)
    parser.add_argument("--modes", nargs="+", choices=MODES, default=list(MODES))
    parser.add_argument("--scale", type=float, default=0.125, help="of lengths: 0.125 is documents of 256 tokens")
    parser.add_argument("--counts", type=float, default=1.0, help="of requests: 1 is 128 of them")
    parser.add_argument("--at-once", type=int, default=12, help="requests")
    parser.add_argument("--kv-pages", type=int, default=2048, help="of each decode service: 16 tokens each")
    parser.add_argument("--out", type=Path, default=Path("build/replicas.json"))
    args = parser.parse_args(argv)
    found = asyncio.run(measure(args))
    args.out.parent.mkdir(parents=True, exist_ok=True)
    settings = {name: value for name, value in vars(args).items() if name != "out"}
    args.out.write_text(json.dumps({"date": str(date.today()), "settings": settings, "runs": found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
