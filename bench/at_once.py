"""``python -m bench.at_once``: how many requests with a large ``max_tokens`` that stop early run at once.

Each asks for as many tokens as it may have and is left when it has a few. Through both services, with the shipped
model on the CPU and a pool whose tails would hold seven answers of full length. Runs with services of before, too: it
only asks ``GetLoads`` while streams run.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import time
from collections.abc import Sequence

from bench.serving_services import fresh_store, running
from cairn import AsyncClient
from cairn.demo.shipped import MODEL

PAGE, QUERY = 16, 8
CHUNK_PAGES = 512
POLL_S = 0.02


async def measure(client: AsyncClient, requests: int, max_tokens: int, stop_after: int) -> dict[str, float]:
    """Streams beside each other; ``at_once`` is the most that ran together."""
    most = 0
    over = asyncio.Event()

    async def watch() -> None:
        nonlocal most
        while not over.is_set():
            most = max(most, (await client.loads()).running)
            await asyncio.sleep(POLL_S)

    async def ask(number: int) -> int:
        query = [1 + (number * 7 + at * 3) % 200 for at in range(QUERY)]
        tokens = 0
        async with client.generate([query], max_tokens=max_tokens, ignore_eos=True) as stream:
            async for delta in stream:
                tokens += len(delta.token_ids)
                if tokens >= stop_after:
                    break
        return tokens

    began = time.monotonic()
    watching = asyncio.create_task(watch())
    made = await asyncio.gather(*(ask(number) for number in range(requests)))
    took = time.monotonic() - began
    over.set()
    await watching
    return {"at_once": most, "seconds": round(took, 2), "tokens": sum(made)}


async def run(args: argparse.Namespace) -> dict[str, float]:
    tails = args.full * -(-(QUERY + args.max_tokens) // PAGE)
    pages = tails + CHUNK_PAGES
    pool = ["--kv-pages", str(pages), "--chunk-page-ratio", str(CHUNK_PAGES / pages), "--page-size", str(PAGE)]
    decode = [*pool, "--batch-max", str(args.requests), "--waiting-max", str(2 * args.requests), *args.decode]
    with fresh_store() as (folder, _):
        shared = ["--model", str(MODEL), "--store", f"file://{folder}"]
        async with (
            running(shared, ["--kv-pages", str(CHUNK_PAGES)], decode) as services,
            AsyncClient(services.prefill, services.decode, timeout_s=1800.0) as client,
        ):
            await measure(client, 4, 8, 4)
            return await measure(client, args.requests, args.max_tokens, args.stop_after)


def main(words: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--requests", type=int, default=128)
    parser.add_argument("--max-tokens", type=int, default=4096)
    parser.add_argument("--stop-after", type=int, default=50)
    parser.add_argument("--full", type=int, default=7, help="answers of full length that the pool's tails hold")
    parser.add_argument("--decode", nargs=argparse.REMAINDER, default=[], help="more options of the decode service")
    print(json.dumps(asyncio.run(run(parser.parse_args(words)))))


if __name__ == "__main__":
    main()
