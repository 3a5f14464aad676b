"""``python -m bench.rag_cpu``: exact RAG with the shipped model on a CPU, beside ``generate`` with a prefix cache.

The trace ``rag``, shorter: a system prompt, then 4 of 32 documents in any order. Ours through both services, one
request at a time and 8 at a time, documents as given and in canonical order. Theirs is ``generate`` of ``transformers``
in this process, one request at a time: it keeps a ``DynamicCache`` of each of the last prompts, and goes on from the
longest common prefix with any of them.
"""

from __future__ import annotations

import argparse
import asyncio
import copy
import json
import statistics
import time
from collections import OrderedDict
from dataclasses import dataclass, field, replace
from datetime import date
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, DynamicCache
from transformers.generation.streamers import BaseStreamer

from bench.models import fable
from bench.serving_figures import figures
from bench.serving_load import RawTarget, job_of
from bench.serving_services import Services, fresh_store, running, vocabulary_of
from bench.traces import Trace, rag
from cairn.load.processes import LoadGenerator

PROMPTS_KEPT = 64
LIMIT_S = 900.0
WARM_UP_TOKENS = 4


class _Arrivals(BaseStreamer):
    """When tokens came; ``put`` is called with the prompt first."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value: torch.Tensor) -> None:
        self.times.append(time.monotonic())

    def end(self) -> None:
        pass


@dataclass
class PrefixCaching:
    """``generate`` with what was computed of the last prompts, the least recently used going first."""

    module: Any
    kept: OrderedDict[tuple[int, ...], DynamicCache] = field(default_factory=OrderedDict)
    computed: int = 0
    prompt_tokens: int = 0

    @torch.inference_mode()
    def generate(self, prompt: tuple[int, ...], max_tokens: int) -> tuple[list[int], list[float]]:
        """The answer, and when its tokens came (monotonic, s)."""
        length, cache = self._longest(prompt)
        self.computed += len(prompt) - length
        self.prompt_tokens += len(prompt)
        ids, arrivals = torch.tensor([prompt]), _Arrivals()
        made = self.module.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            past_key_values=cache,
            max_new_tokens=max_tokens,
            min_new_tokens=max_tokens,
            do_sample=False,
            pad_token_id=0,
            streamer=arrivals,
        )
        self.kept[prompt] = cache
        if len(self.kept) > PROMPTS_KEPT:
            self.kept.popitem(last=False)
        return made[0, len(prompt) :].tolist(), arrivals.times[1:]

    def _longest(self, prompt: tuple[int, ...]) -> tuple[int, DynamicCache]:
        """How much of the prompt is known, and a cache of that; one token at least is left to compute."""
        best, most = None, 0
        for known in self.kept:
            if (same := common_prefix(known, prompt)) > most:
                best, most = known, same
        if best is None:
            return 0, DynamicCache(config=self.module.config)
        self.kept.move_to_end(best)
        most = min(most, len(prompt) - 1)
        cache = copy.deepcopy(self.kept[best])
        if beyond := cache.get_seq_length() - most:
            cache.crop(-beyond)
        return most, cache


def common_prefix(one: tuple[int, ...], other: tuple[int, ...]) -> int:
    """How many tokens both begin with."""
    shorter = min(len(one), len(other))
    if one[:shorter] == other[:shorter]:
        return shorter
    low, high = 0, shorter
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if one[:middle] == other[:middle] else (low, middle)
    return low


def theirs(trace: Trace, module: Any) -> dict[str, Any]:
    """The trace, one request after the other."""
    caching = PrefixCaching(module)
    firsts, tokens, began = [], 0, 0.0
    for number, (request,) in enumerate(trace.sessions):
        if number == trace.warm_up:
            caching.computed = caching.prompt_tokens = 0
            began = time.monotonic()
        prompt = (*(token for place in request.documents for token in trace.documents[place]), *request.query)
        counted = number >= trace.warm_up
        asked = time.monotonic()
        answer, times = caching.generate(prompt, request.max_tokens if counted else WARM_UP_TOKENS)
        if counted:
            firsts.append((times[0] - asked) * 1e3)
            tokens += len(answer)
    return {
        "run": "generate with a prefix cache, 1 at a time",
        "tokens_per_s": round(tokens / (time.monotonic() - began), 1),
        "ttft_p50_ms": round(statistics.median(firsts), 1),
        "prompt_tokens": caching.prompt_tokens,
        "computed": caching.computed,
    }


def ours(services: Services, generator: LoadGenerator, trace: Trace, order: str) -> dict[str, Any]:
    """The trace through the services, ``trace.concurrency`` requests at a time."""
    target = RawTarget(services.decode, "exact", "chunks", order)
    job = job_of(target, trace, 0, trace.warm_up, LIMIT_S, max_tokens=WARM_UP_TOKENS)
    generator.run(job)
    found = figures(generator.run(replace(job, first=trace.warm_up, end=len(trace.sessions), max_tokens=None)))
    if found["errors"]:
        raise RuntimeError(f"some requests failed: {found['errors']} {found['details']}")
    return {
        "run": f"ours, {order} order, {trace.concurrency} at a time",
        "tokens_per_s": found["tokens_per_s"],
        "ttft_p50_ms": found["ttft_ms"]["p50"],
        "prompt_tokens": found["prompt_tokens"],
        "computed": found["prompt_tokens_by_source"].get("computed", 0),
    }


async def measure(scale: float, counts: float, *, together: bool) -> list[dict[str, Any]]:
    """Every run, each over tokens of its own: nothing is left of an earlier one."""
    model = fable()
    shortened = rag(scale, counts).within(vocabulary_of(model.path))
    module = AutoModelForCausalLM.from_pretrained(model.path, dtype=torch.float32, attn_implementation="sdpa")
    results = [theirs(shortened, module)]
    print(json.dumps(results[-1]), flush=True)
    with fresh_store() as (folder, capacity), LoadGenerator(1) as generator:
        shared = ["--model", str(model.path), "--store", f"file://{folder}/store", "--dtype", model.dtype]
        pages = ["--kv-pages", str(len(shortened.sessions) * 5 * len(shortened.documents[-1]) // 16 + 2048)]
        limits = ["--store-capacity", str(capacity), "--log-level", "warning"]
        async with running([*shared, *pages], limits, limits[2:], together=together) as services:
            for number, (order, at_once) in enumerate((order, at_once) for at_once in (1, 8) for order in ORDERS):
                anew = rag(scale, counts).anew(number).within(vocabulary_of(model.path))
                trace = replace(anew, concurrency=at_once)
                results.append(await asyncio.to_thread(ours, services, generator, trace, order))
                print(json.dumps(results[-1]), flush=True)
    return results


ORDERS = ("given", "canonical")


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scale", type=float, default=0.125, help="of lengths: 0.125 is documents of 256 tokens")
    parser.add_argument("--counts", type=float, default=0.5, help="of requests: 0.5 is 64 of them")
    parser.add_argument("--one-process", action="store_true")
    parser.add_argument("--out", type=Path, default=Path("build/rag_cpu.json"))
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    results = asyncio.run(measure(args.scale, args.counts, together=args.one_process))
    settings = {"date": str(date.today()), "scale": args.scale, "counts": args.counts, "one_process": args.one_process}
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps({"settings": settings, "runs": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
