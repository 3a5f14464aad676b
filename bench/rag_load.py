"""``python -m bench.rag_load``: 64 streams of RAG on a CPU, beside transformers; then ten times as much.

The shipped model through both services, over gRPC, as ``cairn bench serve rag`` asks them: a system prompt, 4 of 32
documents by Zipf's law in any order, a query. First a closed loop of ``--streams`` for ``--seconds``; then requests
that arrive by Poisson's law at ``--times`` the rate that the closed loop reached: the services have to turn most of
them away, while those they take keep their latency; then transformers with the first requests of the closed loop, in a
process of its own once the services are gone. What is printed last says what of the goals was reached.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import multiprocessing
import os
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from datetime import date
from pathlib import Path
from typing import Any

from bench.models import fable
from bench.serving_services import fresh_store, running
from cairn.load.answer import OK
from cairn.load.cairn_target import CairnTarget
from cairn.load.figures import figures
from cairn.load.job import Job, poisson
from cairn.load.processes import Load, LoadGenerator
from cairn.load.workload import WORKLOADS, About, Lengths, Seeded, joined

LENGTHS = Lengths(system=64, document=256, query=32, output=64)
WARM_UP_TOKENS = 4
DRAIN_S = 120.0
GOALS = {"p99_gap_by_median": 5.0, "tokens_per_s_by_generate_batch": 3.0}  # at most, and at least


@dataclass(frozen=True)
class Way:
    """How our services are asked."""

    reuse: str
    order: str = "given"

    @property
    def name(self) -> str:
        return self.reuse if self.order == "given" else f"{self.reuse}, {self.order} order"


WAYS = {way.name: way for way in (Way("exact"), Way("exact", "canonical"), Way("anchored"), Way("independent"))}


def workload_of(seed: int) -> Seeded:
    return replace(WORKLOADS["rag"], lengths=LENGTHS, vocabulary=fable().vocabulary, seed=seed)


class Ours:
    """Runs over running services."""

    def __init__(self, args: argparse.Namespace, generator: LoadGenerator, decode: str) -> None:
        self._args, self._generator, self._decode = args, generator, decode

    def closed(self, way: Way, seed: int) -> dict[str, Any]:
        """The closed loop, warmed up; its figures."""
        workload, streams, seconds = workload_of(seed), self._args.streams, self._args.seconds
        target = CairnTarget(self._decode, reuse=way.reuse, order=way.order)
        job = Job(target, workload, streams, 1 << 40, streams, None, seconds, seconds + DRAIN_S)
        self._warm(job)
        return self._figures(self._generator.run(job), seconds)

    def overloaded(self, way: Way, seed: int, rate: float) -> dict[str, Any]:
        """Requests that arrive at that rate (1/s); the figures of those that were accepted."""
        workload, seconds = workload_of(seed), self._args.overload_seconds
        times = tuple(at for at in poisson("overload", rate, [1] * round(2 * rate * seconds + 100)) if at < seconds)
        target = CairnTarget(self._decode, reuse=way.reuse, order=way.order)
        first = self._args.streams
        job = Job(target, workload, first, first + len(times), first, times, seconds, seconds + DRAIN_S)
        self._warm(job)
        return self._figures(self._generator.run(job), seconds) | {"rate": round(rate, 2)}

    def _warm(self, job: Job) -> None:
        """Every document is known, and as many streams as will run have run."""
        short = replace(job, duration_s=None, arrivals=None, limit_s=600.0)
        documents = job.workload.documents
        about = About(job.workload, documents[0][:8])
        short_answers = replace(short, workload=about, first=0, end=len(documents), max_tokens=WARM_UP_TOKENS)
        self._generator.run(short_answers)
        self._generator.run(replace(short, first=0, end=job.first))

    @staticmethod
    def _figures(load: Load, seconds: float) -> dict[str, Any]:
        found = figures(load, seconds)
        waited = [each for each in load.answers if each.status != OK]
        hints = sum(each.retry_after_s is not None for each in waited)
        return found | {"turned_away": len(waited), "with_hint": hints}


def theirs(prompts: list[list[int]], output: int, way: str) -> dict[str, Any]:
    """transformers, in this process: ``generate_batch`` (continuous batching with prefix sharing, its own settings), or
    ``generate`` of all prompts as one padded batch. All have the same output length, so that nothing waits for another.
    """
    import torch
    from transformers import AutoModelForCausalLM, ContinuousBatchingConfig, GenerationConfig

    torch.set_num_threads(os.cpu_count() or 1)
    module = AutoModelForCausalLM.from_pretrained(fable().path, dtype=torch.float32, attn_implementation="sdpa").eval()
    config = GenerationConfig(
        max_new_tokens=output, min_new_tokens=output, do_sample=False, eos_token_id=-1, pad_token_id=0
    )
    began = time.monotonic()
    if way == "generate_batch":
        pages = ContinuousBatchingConfig(num_blocks=sum(len(each) // 256 + 2 for each in prompts), use_cuda_graph=False)
        made = module.generate_batch(prompts, generation_config=config, continuous_batching_config=pages, warmup=False)
        tokens = sum(len(each.generated_tokens) for each in made.values())
    else:
        longest = max(map(len, prompts))
        ids = torch.tensor([[0] * (longest - len(each)) + each for each in prompts])
        mask = torch.tensor([[0] * (longest - len(each)) + [1] * len(each) for each in prompts])
        with torch.inference_mode():
            tokens = module.generate(ids, attention_mask=mask, generation_config=config)[:, longest:].numel()
    took = time.monotonic() - began
    return {
        "requests": len(prompts),
        "tokens": tokens,
        "seconds": round(took, 1),
        "tokens_per_s": round(tokens / took, 2),
    }


def prompts_of(workload: Seeded, first: int, count: int) -> list[list[int]]:
    """What the requests of sessions say, whole."""
    documents = workload.documents
    requests = [workload.session(number)[0] for number in range(first, first + count)]
    whole = [joined([*(documents[place] for place in each.documents), each.query]) for each in requests]
    return [[int(token) for token in each] for each in whole]


async def ours(args: argparse.Namespace) -> dict[str, Any]:
    """Every way, each over tokens of its own; then the overload, in the first way."""
    found: dict[str, Any] = {"closed": {}}
    model = fable()
    with fresh_store() as (folder, capacity), LoadGenerator(args.processes) as generator:
        shared = ["--model", str(model.path), "--store", f"file://{folder}/store", "--dtype", model.dtype]
        shared += ["--log-level", "warning", *(args.service_args.split())]
        prefill, decode = (
            ["--store-capacity", str(capacity)],
            ["--batch-max", str(args.streams), "--waiting-max-s", str(args.waiting_max_s)],
        )
        async with running(shared, prefill, decode, together=args.one_process) as services:
            bench = Ours(args, generator, services.decode)
            for seed, name in enumerate(args.ways):
                found["closed"][name] = await asyncio.to_thread(bench.closed, WAYS[name], seed)
                _say(f"closed, {name}", found["closed"][name])
            way = args.ways[0]
            rate = args.times * found["closed"][way]["tokens_per_s"] / LENGTHS.output
            if args.overload_seconds and rate:
                found["overload"] = await asyncio.to_thread(bench.overloaded, WAYS[way], len(args.ways), rate)
                _say(f"overload, {way}, {rate:.1f} requests/s", found["overload"])
            if services.died.done():
                raise RuntimeError(services.died.result())
    return found


def judged(found: dict[str, Any]) -> dict[str, Any]:
    """What of the goals was reached, by way; of the overload: latencies by those of the closed loop."""
    said: dict[str, Any] = {}
    for way, each in found["closed"].items():
        said[way] = {
            "errors": each["errors"],
            "p99_gap_by_median": _share(each["gap_ms"]["p99"], each["gap_ms"]["p50"]),
        }
        for name in ("generate_batch", "generate"):
            if other := found.get("theirs", {}).get(name):
                said[way][f"tokens_per_s_by_{name}"] = _share(each["tokens_per_s"], other["tokens_per_s"])
    if over := found.get("overload"):
        quiet = next(iter(found["closed"].values()))
        said["overload"] = {
            **{"asked": over["requests"], "answered": over["ok"], "errors": over["errors"]},
            "turned_away_with_hint": _share(over["with_hint"], over["turned_away"]),
            **{
                f"{name}_{at}_by_closed": _share(over[name][at], quiet[name][at])
                for name in ("ttft_ms", "gap_ms", "tpot_ms")
                for at in ("p50", "p99")
            },
            "tokens_per_s_by_closed": _share(over["tokens_per_s"], quiet["tokens_per_s"]),
        }
    return said


def _share(value: float, of: float) -> float:
    return round(value / of, 3) if of else 0.0


def _say(name: str, found: dict[str, Any]) -> None:
    times = "  ".join(
        f"{what} {found[what]['p50']:.0f}/{found[what]['p99']:.0f}/{found[what]['max']:.0f}"
        for what in ("ttft_ms", "gap_ms")
    )
    print(
        f"{name}: {found['ok']} of {found['requests']}, {found['tokens_per_s']:.0f} tokens/s, p50/p99/max {times}, "
        f"errors {found['errors']} {found['details']}, sources {found['prompt_tokens_by_source']}, "
        f"load generator {found['generator']['busiest']:.2f} of a processor",
        flush=True,
    )


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--streams", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=180.0, help="of each closed loop")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=["exact", "independent"])
    parser.add_argument("--times", type=float, default=10.0, help="the overload by the closed loop's rate")
    parser.add_argument("--overload-seconds", type=float, default=60.0, help="0: no overload")
    parser.add_argument("--waiting-max-s", type=float, default=1.0, help="the decode service's bound of waiting")
    parser.add_argument("--compared", type=int, default=16, help="requests of generate_batch; 0: none")
    parser.add_argument("--processes", type=int, default=1, help="of the load generator")
    parser.add_argument("--one-process", action="store_true", help="both services in one")
    parser.add_argument("--service-args", default="", help="more options of both services, in one string")
    parser.add_argument("--out", type=Path, default=Path("build/rag_load.json"))
    args = parser.parse_args(argv)
    found = asyncio.run(ours(args))
    workload = workload_of(0)
    for name, count in (("generate", min(args.streams, 4 * args.compared)), ("generate_batch", args.compared)):
        if count:
            with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as alone:
                prompts = prompts_of(workload, args.streams, count)
                found.setdefault("theirs", {})[name] = alone.submit(theirs, prompts, LENGTHS.output, name).result()
            print(f"transformers, {name}: {found['theirs'][name]}", flush=True)
    found["judged"] = judged(found) | {"goals": GOALS}
    settings = {
        name: value if isinstance(value, int | float | list) else str(value) for name, value in vars(args).items()
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps({"date": str(date.today()), "settings": settings, **found}, indent=1) + "\n")
    print(json.dumps(found["judged"], indent=1))


if __name__ == "__main__":
    main()
