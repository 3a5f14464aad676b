"""The serving comparison: traces through the real services, from a checkpoint on disk, beside what vLLM does with them.

    python -m bench.serving --device cuda                      # every trace in a closed loop on one card
    python -m bench.serving --device cuda --rate 0.8x --traces unshared rag
    python -m bench.serving --device cuda --one-process --traces rag cold agents --history kept
    python -m bench.serving --device cuda --prefill-device cuda:1 --traces rag busy_prefill --order given canonical
    python -m bench.serving --scale 0.02                       # the shipped model on a CPU, small

Every run is a line of JSON as soon as it has ended; ``serving.json`` and ``serving.md`` in ``--out`` are written anew
each time, ``serving.png`` at the end, with the layout behind their names unless it is two processes on one device.
``--profile`` samples the decode service's stacks, which costs it some of its pace. Runs go one after the other over the
same services, so a later one finds what an earlier one left resident; only ``doc_qa_sampled`` and ``busy_prefill`` have
a document that another trace has, too.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import shlex
import signal
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from datetime import date
from itertools import product
from pathlib import Path
from typing import Any

from bench.busy_prefill import Registered, ids_within, registering
from bench.serving_figures import figures, services_between
from bench.serving_load import RawTarget, job_of
from bench.serving_options import HISTORIES, is_recorded, parse
from bench.serving_records import GAP_BUSY, SAMPLED_SHARE, compared
from bench.serving_report import line, plot, table, title
from bench.serving_services import TWO_CARDS, USUAL, Services, checkpoint, fresh_store, running, vocabulary_of
from bench.stack_samples import between, words
from bench.traces import TRACES, Trace
from cairn.load.answer import CUT
from cairn.load.job import Job, poisson
from cairn.load.processes import LoadGenerator

WARM_UP_TOKENS = 4
CLOSED_LOOP_ONLY = ("cold", "busy_prefill")
ANOTHER_RUN = 100  # the variant of a trace that is run in another order, or with another history
BUSY_TOKENS = 2048  # of each chunk that keeps a prefill service busy


@dataclass(frozen=True)
class Run:
    """A trace, and how it is expressed for us."""

    trace: Trace
    mode: str
    history: str
    order: str = "given"
    busy: bool = False  # the prefill service computes other things meanwhile

    @property
    def name(self) -> str:
        words = [self.trace.name]
        if self.trace.name == "agents":
            words.append(HISTORIES[self.history])
        if self.trace.name == "rag" or self.mode != "exact":
            words.append(self.mode)
        if self.order != "given":
            words.append(f"{self.order} order")
        if self.trace.name == "busy_prefill":
            words.append("beside a busy prefill service" if self.busy else "undisturbed")
        return ", ".join(words)


def runs_of(args: argparse.Namespace) -> Iterator[Run]:
    """Every run that was asked for; ``rag`` without a mode in both that matter, the slower one last.

    What would find the documents of an earlier run computed has other tokens.
    """
    for name in args.traces:
        trace = TRACES[name](args.scale, args.counts)
        modes = [args.mode] if args.mode else ["independent", "exact"] if name == "rag" else ["exact"]
        for mode in modes:
            histories = args.history if name == "agents" else ["chunks"]
            orders = args.order if (name, mode) == ("rag", "exact") else ["given"]
            for number, (history, order) in enumerate(product(histories, orders)):
                yield Run(trace.anew(ANOTHER_RUN * number), mode, history, order)
        if name == "busy_prefill":
            yield Run(trace, modes[0], "chunks", busy=True)


def rates(asked: list[str], closed: float) -> Iterator[float]:
    """Requests a second: numbers as they are, ``0.8x`` as a share of the closed loop's."""
    for each in asked:
        yield float(each[:-1]) * closed if each.endswith("x") else float(each)


def arrivals_of(trace: Trace, rate: float) -> tuple[float, ...]:
    """When each session after the warm-up arrives (s), at ``rate`` requests a second; seeded."""
    return poisson(trace.name, rate, [len(session) for session in trace.sessions[trace.warm_up :]])


class Bench:
    """Runs over running services. ``results`` has what was measured so far."""

    def __init__(
        self,
        args: argparse.Namespace,
        services: Services,
        generator: LoadGenerator,
        vocabulary: int,
        stacks: Path | None,
    ) -> None:
        self.results: list[dict[str, Any]] = []
        self._args, self._services, self._generator, self._stacks = args, services, generator, stacks
        self._vocabulary = vocabulary

    async def measure(self, run: Run) -> None:
        """The closed loop, then, if they say something, all rates that were asked for, each with other tokens."""
        closed = await self._counted(run, None)
        if run.trace.name in CLOSED_LOOP_ONLY:
            return
        for number, rate in enumerate(rates(self._args.rate, closed["requests_per_s"]), 1):
            if rate > 0:
                await self._counted(replace(run, trace=run.trace.anew(run.trace.variant + number)), rate)

    async def _counted(self, run: Run, rate: float | None) -> dict[str, Any]:
        """Warms up, then measures; the figures."""
        run = replace(run, trace=run.trace.within(self._vocabulary))
        if self._args.ahead:
            known = replace(run, trace=run.trace.about_each_document())
            await self._load(self._job(known, 0, len(known.trace.sessions)))
        await self._load(self._job(run, 0, run.trace.warm_up, max_tokens=WARM_UP_TOKENS))
        arrivals = None if rate is None else arrivals_of(run.trace, rate)
        job = self._job(run, run.trace.warm_up, len(run.trace.sessions), arrivals=arrivals)
        before = await asyncio.to_thread(self._services.scrape)
        began = time.monotonic()
        async with self._beside(run) as registered:
            found = figures(await self._load(job))
        took = time.monotonic() - began
        grown = services_between(before, await asyncio.to_thread(self._services.scrape))
        if registered is not None:
            found |= {"registered_per_s": round(registered.chunks / took, 2), "not_registered": registered.refused}
        result = {
            **{"run": run.name, "trace": run.trace.name, "mode": run.mode, "history": run.history, "order": run.order},
            **{"rate": rate, "concurrency": run.trace.concurrency, "sampled": run.trace.sampled, "figures": found},
            "compared": self._compared(run, found) if rate is None else {},
            "services": {name: _short(values, took) for name, values in grown.items()},
        }
        self.results.append(result)
        print(json.dumps(result), flush=True)
        if self._stacks is not None:
            threads = words(between(self._stacks, began, began + took), took)
            with (self._args.out / "serving_profile.txt").open("a") as out:
                out.write(f"{title(result)}\n{threads}\n{json.dumps(grown, indent=1)}\n\n")
        return found

    @asynccontextmanager
    async def _beside(self, run: Run) -> AsyncIterator[Registered | None]:
        """What the prefill service has to do meanwhile, if anything."""
        if not run.busy:
            yield None
            return
        tokens = max(8, round(BUSY_TOKENS * self._args.scale))
        async with registering(self._services.prefill, tokens, ids_within(self._vocabulary)) as registered:
            yield registered

    async def _load(self, job: Job) -> Any:
        """Raises ``RuntimeError`` if a service ends meanwhile."""
        load = asyncio.create_task(asyncio.to_thread(self._generator.run, job))
        await asyncio.wait({load, self._services.died}, return_when=asyncio.FIRST_COMPLETED)
        if self._services.died.done():
            raise RuntimeError(self._services.died.result())
        result = load.result()
        failed = {answer.status for answer in result.answers} - {"OK", CUT}
        if failed:
            details = sorted({answer.detail for answer in result.answers if answer.detail})[:3]
            print(f"{job.workload.key}: {sorted(failed)} {details}\n{self._services.tails(20)}", flush=True)
        return result

    def _job(self, run: Run, first: int, end: int, **options: Any) -> Job:
        target = RawTarget(self._services.decode, run.mode, run.history, run.order)
        return job_of(target, run.trace, first, end, self._args.limit_s, **options)

    def _compared(self, run: Run, found: dict[str, Any]) -> dict[str, dict[str, float]]:
        """Beside the records, which are of the full traces on a card; sampled beside greedy, and streams beside a busy
        prefill service beside undisturbed ones, anywhere."""
        two_cards = self._args.layout.name == TWO_CARDS
        recorded = is_recorded(self._args)
        beside = compared(run.name, run.trace.name, found, two_cards=two_cards) if recorded else {}
        greedy = [each["figures"]["tokens_per_s"] for each in self.results if each["run"] == "doc_qa"]
        if run.name == "doc_qa_sampled" and greedy:
            beside["goal"] = {"tokens_per_s": round(found["tokens_per_s"] / (SAMPLED_SHARE * greedy[0]), 3)}
        quiet = [each["figures"] for each in self.results if each["trace"] == "busy_prefill"]
        if run.busy and quiet:
            beside["undisturbed"] = {
                "itl_mean": round(found["itl_mean_ms"] / max(1e-9, quiet[0]["itl_mean_ms"]), 3),
                **{
                    f"gap_{name}": round(value / max(1e-9, quiet[0]["gap_ms"][name]), 3)
                    for name, value in found["gap_ms"].items()
                },
            }
            beside["goal"] = {"itl_mean": round(beside["undisturbed"]["itl_mean"] / GAP_BUSY, 3)}
        return beside


def _short(grown: dict[str, Any], seconds: float) -> dict[str, float]:
    """Processors that a service kept busy, and its steps."""
    short = {"processors_busy": round(grown.get("process_cpu_seconds_total", 0.0) / seconds, 2)}
    if batch := grown.get("cairn_decode_batch_size"):
        short |= {"steps": batch["count"], "rows_a_step": round(batch["mean"], 1)}
    return short


async def run_all(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Starts the services and the generator, runs every trace, stops them; the results."""
    task = asyncio.current_task()
    assert task is not None
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)  # the store goes, too, however this ends
    model = args.model or checkpoint(args.folder, args.device)
    args.out.mkdir(parents=True, exist_ok=True)
    stem = args.out / "_".join(
        ["serving", *([args.layout.name.replace(" ", "_")] if args.layout.name != USUAL else [])]
    )
    settings = {"date": str(date.today()), "device": args.device, "layout": args.layout.name, "model": model.name}
    settings |= {"scale": args.scale, **({} if args.counts is None else {"counts": args.counts})}
    settings |= {"batch-max": args.batch_max, "generator processes": args.generators, "processors": os.cpu_count()}
    settings |= {name: "on" for name in ("profile", "ahead") if getattr(args, name)}
    with fresh_store() as (folder, capacity), LoadGenerator(args.generators) as generator:
        store, stacks = f"file://{folder}/store", folder / "stacks.jsonl" if args.profile else None
        shared = ["--model", str(model), "--store", store, "--log-level", "warning"]
        prefill = [*args.layout.prefill, "--store-capacity", str(capacity), *_kv_pages(args.prefill_kv_pages)]
        decode = [*args.layout.decode, "--batch-max", str(args.batch_max), *_kv_pages(args.decode_kv_pages)]
        began = time.monotonic()
        more = (prefill + shlex.split(args.prefill_args), decode + shlex.split(args.decode_args))
        async with running(shared, *more, stacks, together=args.one_process) as services:
            print(json.dumps({"ready_s": round(time.monotonic() - began, 1), **services.ready}), flush=True)
            bench = Bench(args, services, generator, vocabulary_of(model), stacks)
            try:
                for run in runs_of(args):
                    await bench.measure(run)
                    write(stem, settings, bench.results)
            finally:
                draw(stem, bench.results)
    return bench.results


def write(stem: Path, settings: dict[str, Any], results: list[dict[str, Any]]) -> None:
    """``serving.json`` and ``serving.md``; ``stem`` is their path but for the ending."""
    stem.with_suffix(".json").write_text(json.dumps({"settings": settings, "runs": results}, indent=1) + "\n")
    stem.with_suffix(".md").write_text(table(settings, results))


def draw(stem: Path, results: list[dict[str, Any]]) -> None:
    """``serving.png``, where matplotlib is installed and anything was measured."""
    try:
        if results:
            plot(results, stem.with_suffix(".png"))
    except ImportError:
        print("no plot: matplotlib is not installed", flush=True)


def _kv_pages(pages: int | None) -> list[str]:
    return [] if pages is None else ["--kv-pages", str(pages)]


def main(argv: list[str] | None = None) -> None:
    """Exit code 1 if a request failed; one that was cut off did not."""
    results = asyncio.run(run_all(parse(argv, __doc__)))
    print("\n".join(line(result) for result in results))
    if any(set(result["figures"]["errors"]) - {CUT} for result in results):
        raise SystemExit("some requests failed: see errors and details above")


if __name__ == "__main__":
    main()
