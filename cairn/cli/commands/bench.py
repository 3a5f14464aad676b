"""Measure services under load.

`serve` asks with a seeded workload (shared, rag, conversations, unshared) or a trace, so many at a time or as they
arrive, our own decode service over gRPC or any OpenAI-compatible URL, and prints what came of it. Requests that arrive
by themselves wait from when they are due. Ctrl-C ends it: the figures so far. docs/bench.md says what each figure is.

Exit codes: 0 requests were answered, 1 none was, 2 the command line was wrong, 130 it was interrupted.
"""

from __future__ import annotations

import argparse
import json
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from types import FrameType
from typing import Any

from rich.live import Live

from cairn.cli.arguments import UsageError
from cairn.cli.connection import add_connection_flags
from cairn.cli.load_options import add_load_flags
from cairn.cli.load_plan import Plan, plan_of
from cairn.cli.terminal import Terminal, table
from cairn.client.errors import CairnError
from cairn.load import report
from cairn.load.answer import Progress
from cairn.load.figures import figures
from cairn.load.processes import Load, LoadFailed, LoadGenerator

INTERRUPTED = 130
SMOOTH_S = 2.0  # over which the live rate is taken


def configure(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    serve = actions.add_parser(
        "serve", help="put a load on services and measure", formatter_class=argparse.RawDescriptionHelpFormatter
    )
    serve.description = __doc__
    add_load_flags(serve)
    add_connection_flags(serve)


def run(args: argparse.Namespace, terminal: Terminal) -> int:
    _check_files(args)
    plan = plan_of(args)
    try:
        with LoadGenerator(args.processes) as generator, _interruptible(generator) as interrupted:
            for job in plan.before:
                with terminal.waiting("Warming up ..."):
                    generator.run(job)
                if interrupted:
                    return INTERRUPTED
            load = _measured(generator, plan, terminal)
    except LoadFailed as error:
        raise CairnError(str(error), code="UNAVAILABLE") from error
    found = figures(load, plan.job.duration_s, dict(args.goodput) or None)
    said = report.warnings(found, arriving=plan.job.arrivals is not None)
    result = {"settings": plan.settings, "interrupted": bool(interrupted), "figures": found, "warnings": said}
    _write(args, result, load, plan)
    _show(result, terminal)
    return INTERRUPTED if interrupted else 0 if found["ok"] else 1


def _check_files(args: argparse.Namespace) -> None:
    """Before anything is measured: that what comes of it can be written."""
    for name in ("out", "records", "plot"):
        path: Path | None = getattr(args, name)
        if path is not None and not path.parent.is_dir():
            raise UsageError(f"--{name}: {path.parent} is no folder")
    if args.plot is not None:
        import matplotlib  # noqa: F401  # not installed: said before, not after


@contextmanager
def _interruptible(generator: LoadGenerator) -> Iterator[list[int]]:
    """Ctrl-C ends the job that runs, and is noted; a second one ends the process."""
    interrupted: list[int] = []

    def stop(number: int, frame: FrameType | None) -> None:
        if interrupted:
            raise KeyboardInterrupt
        interrupted.append(number)
        generator.stop()

    before = signal.signal(signal.SIGINT, stop)
    try:
        yield interrupted
    finally:
        signal.signal(signal.SIGINT, before)


def _measured(generator: LoadGenerator, plan: Plan, terminal: Terminal) -> Load:
    """Runs the job that counts; a line says how far it is."""
    began = time.monotonic()
    firsts: list[float] = []
    marks = [(began, 0)]  # tokens by then
    with terminal.live() as live:

        def show(progress: Progress) -> None:
            now = time.monotonic()
            firsts[:] = [*firsts, *progress.firsts_s][-200:]
            marks.append((now, progress.tokens))
            while len(marks) > 2 and marks[1][0] < now - SMOOTH_S:
                marks.pop(0)
            rate = (marks[-1][1] - marks[0][1]) / max(1e-3, marks[-1][0] - marks[0][0])
            if isinstance(live, Live):
                live.update(report.line(progress, now - began, rate, firsts))

        return generator.run(plan.job, show)


def _write(args: argparse.Namespace, result: dict[str, Any], load: Load, plan: Plan) -> None:
    if args.out is not None:
        args.out.write_text(json.dumps(result, indent=1) + "\n")
    if args.records is not None:
        with args.records.open("w") as out:
            for answer in sorted(load.answers, key=lambda each: each.asked):
                record = asdict(answer) | {name: getattr(answer, name) - load.began for name in ("asked", "sent")}
                record["times"] = [round(at - load.began, 6) for at in answer.times]
                out.write(json.dumps(record) + "\n")
    if args.plot is not None:
        report.plot(load.answers, load.began, args.plot, _title(plan))


def _title(plan: Plan) -> str:
    settings = plan.settings
    how = f"{settings['rate']:g} requests/s" if settings["rate"] else f"{settings['concurrency']} at a time"
    how = "as the trace has them" if settings["arrivals"] == "trace" else how
    return f"{settings['workload']}, {how}, {settings.get('url') or settings.get('decode')}"


def _show(result: dict[str, Any], terminal: Terminal) -> None:
    if terminal.as_json:
        terminal.json_line(result)
    else:
        found = result["figures"]
        terminal.say(table(("", *(f"#{name}" for name in report.SPREAD)), report.time_rows(found)))
        terminal.say(table(("", ""), report.rows(found)))
    for words in result["warnings"]:
        terminal.warn(words)
