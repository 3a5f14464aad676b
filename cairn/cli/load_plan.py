"""The jobs that `cairn bench serve` runs, out of its flags."""

from __future__ import annotations

import argparse
import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from cairn.cli.arguments import UsageError
from cairn.cli.connection import connection_options
from cairn.cli.load_options import DURATION_S
from cairn.load.cairn_target import CairnTarget
from cairn.load.job import Job, poisson
from cairn.load.target import Sampling, Target
from cairn.load.trace_file import TraceError, TraceFile, read_trace
from cairn.load.workload import WORKLOADS, About, Lengths, Seeded, Workload

CONCURRENCY = 8
ENDLESS = 1 << 40  # sessions
DAY_S = 86_400.0
WARM_UP_TOKENS = 4
ABOUT = 8  # tokens or characters of the question about a document


@dataclass(frozen=True)
class Plan:
    """What to run, in this order; only ``job`` counts."""

    before: tuple[Job, ...]
    job: Job
    settings: dict[str, Any]


def plan_of(args: argparse.Namespace) -> Plan:
    """The jobs. Raises ``UsageError`` for flags that do not go together."""
    _check(args)
    trace = None if args.trace is None else _trace(args.trace)
    workload: Workload = trace.workload if trace else _seeded(args)
    turns = trace.turns if trace else _seeded(args).turns
    target = _target(args, workload, turns)
    warm_up = args.warm_up if args.warm_up is not None else 0 if trace else args.concurrency or CONCURRENCY
    end, arrivals = _sessions(args, trace, warm_up, turns)
    duration_s = args.duration or (None if args.requests or trace else DURATION_S)
    limit_s = DAY_S if duration_s is None else duration_s + args.drain
    job = Job(target, workload, warm_up, end, args.concurrency or CONCURRENCY, arrivals, duration_s, limit_s)
    short = replace(job, duration_s=None, limit_s=DAY_S, arrivals=None, max_tokens=WARM_UP_TOKENS)
    before = [replace(short, first=0, end=warm_up)] if warm_up else []
    if args.ahead and workload.documents:
        documents = workload.documents
        about = About(workload, documents[0][:ABOUT])
        before.insert(0, replace(short, workload=about, first=0, end=len(documents)))
    return Plan(tuple(before), job, _settings(args, workload, target, job))


def _check(args: argparse.Namespace) -> None:
    """Raises ``UsageError`` for flags of which one leaves the other without a meaning."""
    if args.concurrency and args.rate:
        raise UsageError("--rate: requests arrive by themselves or --concurrency of them run at a time, not both")
    if args.speed and (args.trace is None or args.rate or args.concurrency):
        raise UsageError("--speed: is of the times in a --trace file")
    if args.trace is not None:
        shape = ("system_tokens", "document_tokens", "query_tokens", "output_tokens", "documents", "picked", "zipf")
        for name in (*shape, "turns", "vocabulary"):
            if getattr(args, name) is not None:
                raise UsageError(f"--{name.replace('_', '-')}: is not for a --trace, which says that itself")
    if args.history == "kept" and args.reuse != "exact":
        raise UsageError("--history: turns are kept with --reuse exact")
    if args.url is None:
        for name in ("api", "model", "body"):
            if getattr(args, name):
                raise UsageError(f"--{name}: is for --url")
        return
    for name, usual in (("reuse", "exact"), ("order", "given"), ("history", None), ("salt", None)):
        if getattr(args, name) not in (usual, None):
            raise UsageError(f"--{name}: is of gRPC; give --url what it understands as --body")


def _seeded(args: argparse.Namespace) -> Seeded:
    usual = WORKLOADS[args.workload]
    told = {name: getattr(args, f"{name}_tokens") for name in ("system", "document", "query", "output")}
    lengths = Lengths(
        **{name: getattr(usual.lengths, name) if value is None else value for name, value in told.items()}
    )
    more = {"count": args.documents, "picked": args.picked, "zipf": args.zipf, "turns": args.turns}
    changed = {name: value for name, value in more.items() if value is not None}
    made = replace(usual, lengths=lengths, vocabulary=args.vocabulary, seed=args.seed, **changed)
    if made.picked > made.count:
        raise UsageError(f"--picked: {made.picked} of {made.count} documents cannot be named; give --documents, too")
    return made


def _trace(path: Path) -> TraceFile:
    try:
        return read_trace(path)
    except (TraceError, OSError, UnicodeDecodeError) as error:
        raise UsageError(f"--trace: {error}") from error


def _sessions(
    args: argparse.Namespace, trace: TraceFile | None, first: int, turns: int
) -> tuple[int, tuple[float, ...] | None]:
    """The session before which to end, and when those from ``first`` on arrive."""
    there = len(trace.workload.sessions) if trace else ENDLESS
    if first >= there:
        raise UsageError(f"--warm-up: the trace has {there} sessions, so that none is left to count")
    end = there if args.requests is None else min(there, first + math.ceil(args.requests / turns))
    if args.rate:
        return _poisson(args, end, first, turns, trace)
    if trace is None or trace.arrivals is None or args.concurrency:
        return end, None
    times = trace.arrivals[first:end]
    return end, tuple((at - times[0]) / (args.speed or 1.0) for at in times)


def _poisson(
    args: argparse.Namespace, end: int, first: int, turns: int, trace: TraceFile | None
) -> tuple[int, tuple[float, ...]]:
    """As many as arrive in the time."""
    duration_s = args.duration or (DURATION_S if args.requests is None and trace is None else DAY_S)
    most = end - first if end < ENDLESS else math.ceil(2 * duration_s * args.rate / turns) + 100
    sizes = [len(each) for each in trace.workload.sessions[first:end]] if trace else [turns] * most
    times = tuple(at for at in poisson(f"arrivals {args.seed}", args.rate, sizes) if at < duration_s)
    if not times:
        raise UsageError(f"--rate: nothing arrives in {duration_s:g} s at {args.rate:g} requests/s")
    return first + len(times), times


def _target(args: argparse.Namespace, workload: Workload, turns: int) -> Target:
    connection = connection_options(args)
    sampling = Sampling(args.temperature, args.top_p, not args.stop_at_eos)
    if args.url is None:
        history = args.history or ("kept" if args.reuse == "exact" else "chunks")
        return CairnTarget(
            connection.decode,
            connection.bearer(),
            connection.tls_ca,
            connection.salt,
            connection.timeout,
            args.reuse,
            args.order,
            history,
            sampling,
        )
    from cairn.load.http_target import HttpTarget  # here, for httpx is an extra

    ids = not isinstance(workload.session(0)[0].query, str)
    api = args.api or ("completions" if ids else "chat")
    if ids and api == "chat":
        raise UsageError("--api: chat is made of text, not of token ids; give completions, or leave out --vocabulary")
    if ids and turns > 1:
        raise UsageError("--vocabulary: over HTTP answers come as text, so that turns cannot follow in token ids")
    return HttpTarget(
        args.url, api, args.model, connection.bearer(), connection.tls_ca, connection.timeout, sampling, args.body
    )


def _settings(args: argparse.Namespace, workload: Workload, target: Target, job: Job) -> dict[str, Any]:
    """How it was measured, without what is secret."""
    shape = workload.__dict__ | {"lengths": vars(workload.lengths)} if isinstance(workload, Seeded) else {}
    asked = (
        {"url": args.url, "api": getattr(target, "api", None)}
        if args.url
        else {"decode": getattr(target, "decode", "")}
    )
    return {
        "workload": "trace" if args.trace else args.workload,
        **({"trace": str(args.trace)} if args.trace else {"shape": shape}),
        **asked,
        **({} if args.url else {"reuse": args.reuse, "order": args.order, "history": getattr(target, "history", "")}),
        "concurrency": None if job.arrivals else job.concurrency,
        "rate": args.rate,
        "arrivals": "poisson" if args.rate else "trace" if job.arrivals else "closed",
        "duration_s": job.duration_s,
        "requests": args.requests,
        "warm_up": job.first,
        "ahead": args.ahead,
        "seed": args.seed,
        "temperature": args.temperature or 0.0,
        "top_p": args.top_p,
        "ignore_eos": not args.stop_at_eos,
        "processes": args.processes,
    }
