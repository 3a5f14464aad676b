"""Show on a small model that a cache need not change an answer.

Starts both services with a temporary store, registers a system prompt and documents, and asks questions over the
documents in several orders. Each is asked three times: as it comes, again (warm), and past every cache (cold); all
three must give the tokens of plain transformers generation, and the expected answer. The last question is asked in
INDEPENDENT mode over an order that is new: no document is computed again.

Exit codes: 0 every answer is right, 1 an answer differs or is wrong, or a service failed.
"""

from __future__ import annotations

import argparse
import asyncio
import tempfile
import time
from collections import deque
from contextlib import AsyncExitStack
from pathlib import Path
from typing import TYPE_CHECKING

from cairn.cli.arguments import UsageError, typed
from cairn.cli.connection import add_json_flag, check_model_flag
from cairn.cli.extras import require_server
from cairn.cli.terminal import Terminal, reuse_table, table
from cairn.client.async_client import AsyncClient
from cairn.demo.examples import Examples, Exercise, plan_exercises
from cairn.demo.shipped import EXAMPLES, MODEL
from cairn.demo.trial import Registered, Verdict, register, try_exercise
from cairn.local.processes import LogLine, Processes, ServiceFailed
from cairn.local.services import service_commands
from chunk_store.quantities import parse_seconds
from decode_service.options import DecodeOptions
from prefill_service.options import PrefillOptions

if TYPE_CHECKING:
    from cairn.demo.oracle import PlainModel

DRAIN_S = 10.0


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", default=str(MODEL), metavar="PATH_OR_ID", help="default: the shipped one")
    parser.add_argument(
        "--examples",
        type=Path,
        default=EXAMPLES,
        metavar="DIR",
        help="system.txt, documents/ and questions.json (default: the shipped ones)",
    )
    parser.add_argument("--orders", type=int, default=3, metavar="N", help="document orders (default %(default)s)")
    parser.add_argument("--questions", type=int, default=2, metavar="N", help="in each order (default %(default)s)")
    parser.add_argument("--threads", type=int, default=1, metavar="N", help="of each process (default %(default)s)")
    parser.add_argument("--start-timeout", type=typed(parse_seconds), default=120.0, metavar="SECONDS")
    parser.add_argument("--verbose", action="store_true", help="show the services' logs")
    add_json_flag(parser)


def run(args: argparse.Namespace, terminal: Terminal) -> int:
    require_server()
    check_model_flag(args.model)
    if args.orders < 1 or args.questions < 1:
        raise UsageError("--orders and --questions must be at least 1")
    try:
        examples = Examples.read(args.examples)
        exercises = plan_exercises(examples, args.orders, args.questions)
    except (OSError, ValueError) as error:
        raise UsageError(f"cannot use the examples: {error}") from error
    log: deque[str] = deque(maxlen=100)

    def keep(service: str, line: str) -> None:
        log.append(f"{service:>7} | {line}")
        if args.verbose:
            terminal.log(log[-1], "dim")

    begin = time.perf_counter()
    try:
        verdicts = asyncio.run(_demonstrate(args, examples, exercises, terminal, keep))
    except (ServiceFailed, OSError) as error:  # OSError: there is no such model
        for line in () if args.verbose else log:
            terminal.log(line, "dim")
        terminal.failed(error)
        return 1
    return _conclude(terminal, verdicts, time.perf_counter() - begin)


async def _demonstrate(
    args: argparse.Namespace, examples: Examples, exercises: list[Exercise], terminal: Terminal, log: LogLine
) -> list[Verdict]:
    verdicts = []
    async with AsyncExitStack() as stack:
        store = stack.enter_context(tempfile.TemporaryDirectory(prefix="cairn-demo-"))
        shared = {"model": args.model, "store": f"file://{store}", "dtype": "float32", "threads": args.threads}
        prefill, decode = service_commands(PrefillOptions(**shared), DecodeOptions(**shared, prefill=""))
        processes = Processes(log)
        begin = time.perf_counter()
        with terminal.waiting("Starting the prefill and the decode service ..."):
            stack.push_async_callback(processes.stop, DRAIN_S)
            await processes.start((prefill, decode))
            loading = asyncio.create_task(asyncio.to_thread(_load_oracle, args.model, args.threads))
            stack.push_async_callback(_settle, loading)  # also when a service fails first
            await processes.wait_ready(args.start_timeout)
            serving_s = time.perf_counter() - begin
            oracle = await loading
        terminal.note(f"Both services serve after {serving_s:.1f} s.", "dim")
        client = await stack.enter_async_context(AsyncClient(prefill.address, decode.address, timeout_s=60.0))
        with terminal.waiting("Registering the documents ..."):
            registered = await register(client, examples)
        _say_registered(terminal, registered)
        for number, exercise in enumerate(exercises, start=1):
            _say_question(terminal, f"{number}/{len(exercises)}", exercise)
            show = (lambda text: None) if terminal.as_json else terminal.stream
            verdict = await try_exercise(client, registered, examples, exercise, oracle, show)
            _say_verdict(terminal, verdict)
            verdicts.append(verdict)
    return verdicts


async def _settle(task: asyncio.Task[PlainModel]) -> None:
    """Wait for a task and forget how it ended."""
    await asyncio.gather(task, return_exceptions=True)


def _load_oracle(model: str, threads: int) -> PlainModel:
    from cairn.demo.oracle import PlainModel  # imports torch: only the demonstration needs it

    return PlainModel(model, threads)


def _say_registered(terminal: Terminal, registered: Registered) -> None:
    chunks = [registered.system, *registered.documents.values()]
    rows = [(c.name, c.type, c.tokens, c.outcome, f"{c.timings.total_s * 1000:.0f}") for c in chunks]
    terminal.note(table(("registered", "type", "#tokens", "outcome", "#ms"), rows))


def _say_question(terminal: Terminal, number: str, exercise: Exercise) -> None:
    if not terminal.as_json:
        order = ", ".join(name.removesuffix(".txt") for name in exercise.order)
        terminal.say(f"\n{number}  {exercise.question.question}", "bold")
        terminal.say(f"     {exercise.reuse} over {order}", "dim")


def _say_verdict(terminal: Terminal, verdict: Verdict) -> None:
    if terminal.as_json:
        terminal.json_line({"event": "answered", **vars(verdict)})
        return
    terminal.stream("\n")
    terminal.say(reuse_table(verdict.result.reuse))
    times = ((verdict.cold_s, "cold"), (verdict.first_s, "as asked"), (verdict.warm_s, "warm"))
    terminal.say("time to first token: " + ", ".join(f"{seconds * 1000:.1f} ms {name}" for seconds, name in times))
    usage = verdict.result.usage
    counts = f"{usage.prompt_tokens} prompt tokens, {usage.computed_tokens} of them computed"
    if verdict.problems:
        label = "DIFFERS" if verdict.compared == "DIFFERS" else "WRONG"
        terminal.say(f"{label}: {'; '.join(verdict.problems)} ({counts})", "bold red")
    elif verdict.compared:
        terminal.say(f"{verdict.compared} to plain transformers generation, and as expected ({counts})", "green")
    else:
        terminal.say(f"as expected, with the documents in a new order ({counts})", "green")


def _conclude(terminal: Terminal, verdicts: list[Verdict], seconds: float) -> int:
    good = sum(not verdict.problems for verdict in verdicts)
    terminal.result(
        {"event": "done", "answers": len(verdicts), "good": good, "seconds": round(seconds, 1)},
        f"\n{good} of {len(verdicts)} answers are as they must be, in {seconds:.0f} s.",
    )
    return 0 if good == len(verdicts) else 1
