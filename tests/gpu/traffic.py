"""Mixed traffic through running services, and when its tokens came."""

from __future__ import annotations

import asyncio
import itertools
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from cairn import AsyncClient, Result
from cairn.load.figures import percentile
from tests.end_to_end.processes import Process

TOKENS = 48
LONG_CHUNK = 5000  # computed in pieces of its own, where a runner does that
STAGGER_S = 0.03  # between two arrivals: somebody is always being prefilled while others decode
WORDS = ("stone", "path", "river", "cairn", "fog", "ridge", "north", "lamp", "snow", "wind", "valley", "hut", "rope")

Prompt = list[Any]  # chunks (token ids or text), then the query (the same)


@dataclass(frozen=True)
class Asked:
    """A request by its kind's name."""

    name: str
    prompt: Prompt
    options: dict[str, Any]


def text_of(words: int, seed: int) -> str:
    """Words without order, about as many tokens."""
    return " ".join(WORDS[(seed + n * n) % len(WORDS)] + str((seed * n) % 7) for n in range(words))


def mixed_traffic(chunks: Sequence[list[int]], vocabulary: int) -> list[Asked]:
    """Each kind of sampling, over chunks, with a long query of its own and with long text."""
    nucleus = {"temperature": 0.8, "top_p": 0.95}
    kinds: dict[str, dict[str, Any]] = {
        "greedy": {},
        "greedy, logprobs": {"logprobs": True},
        "nucleus": nucleus,
        "nucleus, logprobs": {**nucleus, "logprobs": True},
        "top_k, min_p": {"temperature": 1.2, "top_k": 40, "min_p": 0.02, "logprobs": True},
        "penalties": {"repetition_penalty": 1.2, "frequency_penalty": 0.5, "presence_penalty": 0.3, "logprobs": True},
        "sampled, penalties": {**nucleus, "frequency_penalty": 1.0, "min_tokens": 8, "logprobs": True},
    }
    asked: list[Asked] = []
    for number, (name, options) in enumerate(kinds.items()):
        mine = [(97 * number + 13 * n) % vocabulary for n in range(40)]
        long = [(89 * number + 17 * n) % vocabulary for n in range(1100 + 90 * number)]
        prompts: dict[str, Prompt] = {
            "over chunks": [chunks[0], chunks[1], mine],
            "over a long chunk": [[(83 * n) % vocabulary for n in range(LONG_CHUNK)], mine],
            "own": [long],
            "long text": [chunks[number % 2], text_of(900 + 100 * number, number)],
        }
        for kind, prompt in prompts.items():
            asked.append(Asked(f"{name}, {kind}", prompt, {**options, "seed": 1000 + len(asked)}))
    return asked


async def ask(client: AsyncClient, asked: Asked, after_s: float = 0.0) -> tuple[Result, list[float]]:
    """The answer, and when each of its messages came (s)."""
    await asyncio.sleep(after_s)
    times = []
    stream = client.generate(asked.prompt, max_tokens=TOKENS, ignore_eos=True, **asked.options)
    async for delta in stream:
        times.extend([time.perf_counter()] * bool(delta.token_ids))
    return stream.result, times


async def together(services: tuple[Process, Process], traffic: Sequence[Asked], label: str) -> list[Result]:
    """All of ``traffic``, one arriving shortly after the other; prints the gaps between tokens."""
    prefill, decode = services
    async with AsyncClient(prefill=prefill.address, decode=decode.address, timeout_s=120) as client:
        answers = await asyncio.gather(*(ask(client, each, n * STAGGER_S) for n, each in enumerate(traffic)))
    gaps = [(b - a) * 1e3 for _, times in answers for a, b in itertools.pairwise(times)]
    first = [result.timings.first_token_s * 1e3 for result, _ in answers]
    shares = {"p50": 0.5, "p99": 0.99, "max": 1.0}
    of = {"gap_ms": gaps, "first_token_ms": first}
    told = {name: {key: round(percentile(ms, share), 1) for key, share in shares.items()} for name, ms in of.items()}
    print(json.dumps({"traffic": label, "requests": len(traffic), **told}))
    return [result for result, _ in answers]


async def alone(services: tuple[Process, Process], traffic: Sequence[Asked]) -> list[Result]:
    """Each of ``traffic`` with nobody beside it."""
    prefill, decode = services
    async with AsyncClient(prefill=prefill.address, decode=decode.address, timeout_s=120) as client:
        return [(await ask(client, each))[0] for each in traffic]
