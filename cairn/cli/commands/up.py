"""Start the prefill and the decode service on this machine and keep them together.

Prints a line when both serve. Ctrl-C or SIGTERM drains: running requests may finish, new ones are refused; a second
Ctrl-C ends at once. If one service dies the other is stopped; nothing is restarted silently.

With --token-file both services let in the callers whose tokens it holds; a decode service that is a process of its own
comes to the prefill service with a token that is made at the start. With --tls-cert and --tls-key both serve TLS; the
certificate must name the address that they listen on.

On a GPU both services are one process, over one copy of the model and one pool of KV, unless --separate says otherwise
or they are given different devices or settings of the model; on the CPU they are two, unless --no-separate is given.

With --http-port a gateway serves OpenAI's HTTP at that port, over both services: a process of its own, stopped first.
In the file of --config the table [gateway] has its other settings.

Unless given, the model is the small one that comes with Cairn, the store a directory below the user's cache, and the
ports are 50071 (prefill) and 50072 (decode), of the metrics 9471 and 9472.

Exit codes: 0 stopped on request, 1 a service failed or had to be killed.
"""

from __future__ import annotations

import argparse
import asyncio
import signal
import time
from dataclasses import replace
from typing import Any

from rich.text import Text

from cairn.cli.arguments import UsageError
from cairn.cli.connection import add_json_flag
from cairn.cli.extras import require_http, require_server
from cairn.cli.terminal import Terminal
from cairn.local.http import NAME as GATEWAY
from cairn.local.http import gateway_command
from cairn.local.processes import Command, Place, Processes, ServiceFailed
from cairn.local.services import (
    Settings,
    flagged,
    in_one_process,
    private_tokens,
    service_commands,
    together_command,
)
from chunk_store.quantities import human_age
from serving.process.model_path import check_model
from serving.process.sources import EPILOG, Resolved, SettingError, Sources, add_flags

PROGRESS_S = 1.0  # between two changes of what is shown while the services start
DRAINS = 2  # running calls have the drain time, and then what they computed has it to be written out
KILL_AFTER_S = 3.0  # a service that has not ended so long after that is killed
STYLES = {"prefill": "cyan", "decode": "magenta", "cairn": "cyan", GATEWAY: "blue"}


def configure(parser: argparse.ArgumentParser) -> None:
    parser.epilog = EPILOG
    add_flags(parser, flagged(), ("prefill", "decode"))
    add_json_flag(parser)


def run(args: argparse.Namespace, terminal: Terminal) -> int:
    require_server()
    try:
        sources = Sources.read(vars(args))
        settings = Settings.read(sources)
        for service in (settings.prefill, settings.decode):
            _check_model(service)
        if settings.up.options.http_port is not None:
            require_http()
        together = in_one_process(settings)
    except SettingError as error:
        raise UsageError(str(error)) from error
    up, prefill, decode = settings.up.options, settings.prefill.options, settings.decode.options
    tls_ca = up.tls_ca or prefill.tls_cert
    with private_tokens(None if together else prefill.token_file) as tokens:
        commands: tuple[Command, ...] = (
            (together_command(prefill, decode, tls_ca),)
            if together
            else service_commands(
                replace(prefill, token_file=tokens), replace(decode, prefill_token_file=tokens), tls_ca
            )
        )
        if up.http_port is not None:
            own = (up.http_port, commands, decode, prefill.token_file)
            commands = (*commands, gateway_command(*own, tls_ca, sources.path))
        grace_s = DRAINS * max(prefill.drain_s, decode.drain_s) + KILL_AFTER_S
        named = (("prefill", prefill), ("decode", decode), ("cairn", decode), (GATEWAY, decode))
        as_json = {name for name, one in named if one.log_format == "json"}
        processes = Processes(lambda service, line: _log(terminal, "" if service in as_json else service, line))
        return asyncio.run(_serve(commands, processes, up.start_timeout, grace_s, terminal))


def _check_model(service: Resolved[Any]) -> None:
    """Raises ``SettingError`` for a model that cannot be there, before two services load what they can to find out."""
    try:
        check_model(service.options.model)
    except ValueError as error:
        raise SettingError(service.about("model", str(error))) from error


async def _serve(
    commands: tuple[Command, ...], processes: Processes, start_timeout_s: float, grace_s: float, terminal: Terminal
) -> int:
    stopping = _stop_on_signals(processes)
    asked = asyncio.create_task(stopping.wait())
    failure = ""
    try:
        await processes.start(commands)
        failure = await _until_asked(processes, commands, start_timeout_s, asked, terminal)
    except ServiceFailed as error:
        failure = str(error)
    finally:
        terminal.note("Stopping ..." if not failure else f"cairn: {failure}; stopping the rest", "bold")
        clean = await processes.stop(grace_s)
        asked.cancel()
    if terminal.as_json:
        terminal.json_line({"event": "stopped", "reason": failure or "asked", "clean": clean})
    return 1 if failure or not clean else 0


async def _until_asked(
    processes: Processes,
    commands: tuple[Command, ...],
    start_timeout_s: float,
    asked: asyncio.Task[Any],
    terminal: Terminal,
) -> str:
    """Wait for readiness, say so, and wait for the end: "" if it was asked for, else what happened."""
    started = time.monotonic()
    ready = asyncio.create_task(processes.wait_ready(start_timeout_s))
    with terminal.waiting("Starting the prefill and the decode service ...") as status:
        while not (ready.done() or asked.done()):
            await asyncio.wait({ready, asked}, timeout=PROGRESS_S, return_when=asyncio.FIRST_COMPLETED)
            if status is not None:
                names = " and ".join(processes.not_ready()) or "health checks"
                status.update(f"Waiting for {names}, {human_age(time.monotonic() - started)} so far ...")
    if not ready.done():
        ready.cancel()
        return ""
    if other := _differ(ready.result()):
        return other
    _say_ready(terminal, commands, ready.result(), time.monotonic() - started)
    died = asyncio.create_task(processes.first_exit())
    await asyncio.wait({died, asked}, return_when=asyncio.FIRST_COMPLETED)
    if died.done() and not asked.done():
        return died.result()
    died.cancel()
    return ""


def _say_ready(
    terminal: Terminal, commands: tuple[Command, ...], events: dict[str, dict[str, Any]], seconds: float
) -> None:
    everyone = [place for command in commands for place in command.places]
    there = [place for place in everyone if place.rpcs]
    places = {
        place.name: {"address": place.address, "metrics": _metrics_url(place, events[place.name])} for place in there
    }
    for place in everyone:
        if not place.rpcs:
            places[place.name] = {
                "address": place.address,
                "url": f"http{'s' if place.tls_ca else ''}://{place.address}/v1",
            }
    names = ("dtype", "dtype_reason", "attention", "attention_reason")
    served = {name: events[there[0].name].get(name, "") for name in names}
    answers = events[there[-1].name]
    served |= {name: answers[name] for name in ("same_bits", "same_bits_reason") if name in answers}
    if terminal.as_json:
        terminal.json_line({"event": "ready", **places, **served, "seconds": round(seconds, 3)})
        return
    terminal.say(
        f"Ready in {seconds:.1f} s{_words_for(served)}. "
        + " ".join(f"{name} {_where(place)}" for name, place in places.items())
    )
    if served["attention"]:
        terminal.note(f"Attention is {served['attention']}'s: {served['attention_reason']}", "dim")
    if "same_bits" in served:
        kept = "the same in every batch" if served["same_bits"] else "not promised to be the same in every batch"
        terminal.note(f"Bits of answers are {kept}: {served['same_bits_reason']}", "dim")


def _where(place: dict[str, str]) -> str:
    return place.get("url") or f"{place['address']} (metrics {place['metrics']})"


def _words_for(served: dict[str, Any]) -> str:
    return f" in {served['dtype']} ({served['dtype_reason']})" if served["dtype"] else ""


def _differ(events: dict[str, dict[str, Any]]) -> str:
    """Why the services cannot work together, if each chose a dtype or attention of its own; otherwise ""."""
    for setting, words in (("dtype", "dtypes"), ("attention", "attention kernels")):
        chosen = {name: event.get(setting, "") for name, event in events.items() if name != GATEWAY}
        if len(set(chosen.values())) > 1:
            said = ", ".join(f"{name} {what}" for name, what in chosen.items())
            return f"the services chose different {words} ({said}); give --{setting}"
    return ""


def _metrics_url(place: Place, event: dict[str, Any]) -> str:
    return f"http://{place.address.rpartition(':')[0]}:{event.get('metrics_port')}/metrics"


def _stop_on_signals(processes: Processes) -> asyncio.Event:
    """An event that the first SIGINT or SIGTERM sets; the second one kills."""
    stopping = asyncio.Event()

    def stop() -> None:
        if stopping.is_set():
            processes.kill()
        stopping.set()

    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, stop)
    return stopping


def _log(terminal: Terminal, service: str, line: str) -> None:
    terminal.log(Text.assemble((f"{service:>7} | " if service else "", STYLES.get(service, "")), line))
