"""The serving comparison: traces through the real services, from a checkpoint on disk, beside what vLLM does with them.

    python -m bench.serving --device cuda                      # five traces in a closed loop on one card
    python -m bench.serving --device cuda --rate 0.8x --traces unshared rag
    python -m bench.serving --scale 0.02                       # the shipped model on a CPU, small

Every run is a line of JSON as soon as it has ended; ``serving.json`` and ``serving.md`` in ``--out`` are written anew
each time, ``serving.png`` at the end. ``--profile`` samples the decode service's stacks, which costs it some of its
pace. Runs go one after the other over the same services, so a later one finds what an earlier one left resident; only
``doc_qa_sampled`` has a document that another trace has, too.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import shlex
import signal
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from random import Random
from typing import Any

from bench.serving_figures import SAMPLED_SHARE, compared, figures, services_between
from bench.serving_load import CUT, MODES, Job, LoadGenerator
from bench.serving_report import line, plot, table, title
from bench.serving_services import ON_ONE_CARD, Services, checkpoint, fresh_store, running, vocabulary_of
from bench.stack_samples import between, words
from bench.traces import TRACES, Trace

WARM_UP_TOKENS = 4
HISTORIES = {"chunks": "history as chunks", "tail": "history in the tail"}


@dataclass(frozen=True)
class Run:
    """A trace, and how it is expressed for us."""

    trace: Trace
    mode: str
    history: str

    @property
    def name(self) -> str:
        words = [self.trace.name]
        if self.trace.name == "agents":
            words.append(HISTORIES[self.history])
        if self.trace.name == "rag" or self.mode != "exact":
            words.append(self.mode)
        return ", ".join(words)


def runs_of(args: argparse.Namespace, vocabulary: int) -> Iterator[Run]:
    """Every run that was asked for; ``rag`` without a mode in both that matter, the slower one last."""
    for name in args.traces:
        trace = TRACES[name](args.scale).within(vocabulary)
        modes = [args.mode] if args.mode else ["independent", "exact"] if name == "rag" else ["exact"]
        for mode in modes:
            for history in args.history if name == "agents" else ["chunks"]:
                yield Run(trace, mode, history)


def rates(asked: list[str], closed: float) -> Iterator[float]:
    """Requests a second: numbers as they are, ``0.8x`` as a share of the closed loop's."""
    for each in asked:
        yield float(each[:-1]) * closed if each.endswith("x") else float(each)


def above_zero(text: str) -> float:
    """For argparse: a number above 0."""
    with suppress(ValueError):
        if 0 < (number := float(text)) < float("inf"):
            return number
    raise argparse.ArgumentTypeError(f"not a number above 0: {text}")


def rate_of(text: str) -> str:
    """For argparse: a rate as ``rates`` reads it."""
    above_zero(text.removesuffix("x"))
    return text


def poisson(trace: Trace, rate: float) -> tuple[float, ...]:
    """When each session after the warm-up arrives (s), at ``rate`` requests a second; seeded."""
    random, at, times = Random(trace.name), 0.0, []
    for session in trace.sessions[trace.warm_up :]:
        at += random.expovariate(rate / len(session))
        times.append(at)
    return tuple(times)


class Bench:
    """Runs over running services. ``results`` has what was measured so far."""

    def __init__(
        self, args: argparse.Namespace, services: Services, generator: LoadGenerator, stacks: Path | None
    ) -> None:
        self.results: list[dict[str, Any]] = []
        self._args, self._services, self._generator, self._stacks = args, services, generator, stacks

    async def measure(self, run: Run) -> None:
        """Warms up, then the closed loop, then every rate that was asked for."""
        trace = run.trace
        await self._load(self._job(run, 0, trace.warm_up, max_tokens=WARM_UP_TOKENS))
        closed = await self._counted(run, None)
        for rate in rates(self._args.rate, closed["requests_per_s"]):
            if rate > 0:
                await self._counted(run, rate)

    async def _counted(self, run: Run, rate: float | None) -> dict[str, Any]:
        arrivals = None if rate is None else poisson(run.trace, rate)
        job = self._job(run, run.trace.warm_up, len(run.trace.sessions), arrivals=arrivals)
        before = await asyncio.to_thread(self._services.scrape)
        began = time.monotonic()
        found = figures(await self._load(job))
        took = time.monotonic() - began
        grown = services_between(before, await asyncio.to_thread(self._services.scrape))
        result = {
            **{"run": run.name, "trace": run.trace.name, "mode": run.mode, "history": run.history},
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
            print(f"{job.trace.name}: {sorted(failed)} {details}\n{self._services.tails(20)}", flush=True)
        return result

    def _job(self, run: Run, first: int, end: int, **options: Any) -> Job:
        return Job(self._services.decode, run.trace, first, end, run.mode, run.history, self._args.limit_s, **options)

    def _compared(self, run: Run, found: dict[str, Any]) -> dict[str, dict[str, float]]:
        """Beside the records, which are of the full traces on a card; sampled beside greedy anywhere."""
        whole = self._args.scale == 1.0 and self._args.device != "cpu"
        beside = compared(run.name, run.trace.name, found) if whole else {}
        greedy = [each["figures"]["tokens_per_s"] for each in self.results if each["run"] == "doc_qa"]
        if run.name == "doc_qa_sampled" and greedy:
            beside["goal"] = {"tokens_per_s": round(found["tokens_per_s"] / (SAMPLED_SHARE * greedy[0]), 3)}
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
    on_card = ON_ONE_CARD if args.device != "cpu" else {"prefill": [], "decode": []}
    settings = {"date": str(date.today()), "device": args.device, "model": model.name, "scale": args.scale}
    settings |= {"batch-max": args.batch_max, "generator processes": args.generators, "processors": os.cpu_count()}
    settings |= {"profile": "on"} if args.profile else {}
    with fresh_store() as (folder, capacity), LoadGenerator(args.generators) as generator:
        store, stacks = f"file://{folder}/store", folder / "stacks.jsonl" if args.profile else None
        shared = ["--model", str(model), "--store", store, "--device", args.device, "--log-level", "warning"]
        prefill = [*on_card["prefill"], "--store-capacity", str(capacity), *_kv_pages(args.prefill_kv_pages)]
        decode = [*on_card["decode"], "--batch-max", str(args.batch_max), *_kv_pages(args.decode_kv_pages)]
        began = time.monotonic()
        more = (prefill + shlex.split(args.prefill_args), decode + shlex.split(args.decode_args))
        async with running(shared, *more, stacks) as services:
            print(json.dumps({"ready_s": round(time.monotonic() - began, 1), **services.ready}), flush=True)
            bench = Bench(args, services, generator, stacks)
            try:
                for run in runs_of(args, vocabulary_of(model)):
                    await bench.measure(run)
                    write(args.out, settings, bench.results)
            finally:
                draw(args.out, bench.results)
    return bench.results


def write(out: Path, settings: dict[str, Any], results: list[dict[str, Any]]) -> None:
    """``serving.json`` and ``serving.md``."""
    (out / "serving.json").write_text(json.dumps({"settings": settings, "runs": results}, indent=1) + "\n")
    (out / "serving.md").write_text(table(settings, results))


def draw(out: Path, results: list[dict[str, Any]]) -> None:
    """``serving.png``, where matplotlib is installed and anything was measured."""
    try:
        if results:
            plot(results, out / "serving.png")
    except ImportError:
        print("no plot: matplotlib is not installed", flush=True)


def _kv_pages(pages: int | None) -> list[str]:
    return [] if pages is None else ["--kv-pages", str(pages)]


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--traces", nargs="+", choices=TRACES, default=list(TRACES))
    parser.add_argument("--mode", choices=MODES, help="of every trace; default exact, and rag independent, too")
    parser.add_argument("--history", nargs="+", choices=HISTORIES, default=list(HISTORIES), help="of agents' turns")
    rates_help = "Poisson runs, too: requests/s, or 0.8x the closed loop's"
    parser.add_argument("--rate", nargs="*", type=rate_of, default=[], metavar="RATE", help=rates_help)
    parser.add_argument("--scale", type=above_zero, default=1.0, help="of lengths, requests and concurrency")
    parser.add_argument("--device", default="cpu")
    parser.add_argument(
        "--model", type=Path, help="a checkpoint (default: fable on a CPU, a random 8B shape elsewhere)"
    )
    parser.add_argument("--folder", type=Path, default=Path("/tmp/cairn-8b"), help="of the random checkpoint")
    parser.add_argument("--batch-max", type=int, default=64)
    parser.add_argument("--prefill-kv-pages", type=int)
    parser.add_argument("--decode-kv-pages", type=int)
    parser.add_argument("--prefill-args", default="", help="more options of the prefill service, in one string")
    parser.add_argument("--decode-args", default="", help="more options of the decode service, in one string")
    parser.add_argument(
        "--generators",
        type=int,
        choices=range(1, 9),
        default=min(4, max(1, (os.cpu_count() or 1) // 2)),
        help="processes",
    )
    parser.add_argument("--limit-s", type=float, default=120.0, help="for a run; what is unanswered then is cut off")
    parser.add_argument("--profile", action="store_true", help="serving_profile.txt, too: metrics, stacks")
    parser.add_argument("--out", type=Path, default=Path("bench/results"))
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    """Exit code 1 if a request failed; one that was cut off did not."""
    results = asyncio.run(run_all(parse(argv)))
    print("\n".join(line(result) for result in results))
    if any(set(result["figures"]["errors"]) - {CUT} for result in results):
        raise SystemExit("some requests failed: see errors and details above")


if __name__ == "__main__":
    main()
