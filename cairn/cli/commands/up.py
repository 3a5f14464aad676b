"""Start the prefill and the decode service on this machine and keep them together.

Prints a line when both serve. Ctrl-C or SIGTERM drains: running requests may finish, new ones are refused; a second
Ctrl-C ends at once. If one service dies the other is stopped; nothing is restarted silently.

With --token-file both services let in the callers whose tokens it holds; the decode service itself comes to the prefill
service with a token that is made at the start. With --tls-cert and --tls-key both serve TLS; the certificate must name
the address that they listen on.

Exit codes: 0 stopped on request, 1 a service failed or had to be killed.
"""

from __future__ import annotations

import argparse
import asyncio
import signal
import time
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from rich.text import Text

from cairn.cli.arguments import UsageError, typed
from cairn.cli.connection import add_json_flag, check_model_flag
from cairn.cli.extras import require_server
from cairn.cli.stores import add_store_flag
from cairn.cli.terminal import Terminal
from cairn.local.processes import Command, Processes, ServiceFailed
from cairn.local.services import Settings, private_tokens, service_commands
from chunk_store.quantities import human_age, parse_seconds
from serving.rpc.exposure import exposure_refusal

PROGRESS_S = 1.0  # between two changes of what is shown while the services start
KILL_AFTER_S = 3.0  # a service that has not ended so long after its drain time is killed
STYLES = {"prefill": "cyan", "decode": "magenta"}


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", required=True, metavar="PATH_OR_ID", help="a model directory or hub id")
    add_store_flag(parser)
    parser.add_argument("--device", default="cpu", help="cpu (default) or cuda")
    parser.add_argument("--dtype", choices=("auto", "float32", "bfloat16"))
    parser.add_argument("--model-name", metavar="NAME", help="how metrics and replies name the model")
    parser.add_argument("--threads", type=int, metavar="N", help="compute threads of each service")
    parser.add_argument("--log-level", help="of both services, for example debug")
    parser.add_argument("--log-format", choices=("text", "json"), help="json: the services' own lines, one object each")
    ports = parser.add_argument_group("addresses (port 0: any free one)")
    ports.add_argument("--host", default="127.0.0.1", help="address to listen on (default %(default)s)")
    ports.add_argument("--prefill-port", type=int, default=50071, metavar="N", help="default %(default)s")
    ports.add_argument("--decode-port", type=int, default=50072, metavar="N", help="default %(default)s")
    ports.add_argument("--prefill-metrics-port", type=int, default=9471, metavar="N", help="default %(default)s")
    ports.add_argument("--decode-metrics-port", type=int, default=9472, metavar="N", help="default %(default)s")
    access = parser.add_argument_group("access")
    access.add_argument("--token-file", type=Path, metavar="FILE", help="bearer tokens, see docs/tenants.md")
    access.add_argument("--tls-cert", type=Path, metavar="FILE", help="certificate chain, PEM")
    access.add_argument("--tls-key", type=Path, metavar="FILE", help="private key, PEM")
    access.add_argument("--tls-ca", type=Path, metavar="FILE", help="its authority, PEM (default: the certificate)")
    access.add_argument(
        "--insecure",
        action="store_true",
        help="listen beyond this machine without tokens and TLS",
    )
    memory = parser.add_argument_group("memory")
    memory.add_argument("--page-size", type=int, metavar="N", help="tokens a page (default 16)")
    memory.add_argument("--pool-pages", type=int, metavar="N", help="pages of the decode service's KV pool")
    memory.add_argument("--prefill-pool-pages", type=int, metavar="N", help="pages of the prefill service's KV pool")
    memory.add_argument("--chunk-page-ratio", type=float, metavar="SHARE", help="of the pool for chunks (default 0.5)")
    memory.add_argument("--registry-max", type=int, metavar="N", help="registered chunks at most")
    memory.add_argument("--store-capacity", metavar="BYTES", help="of stored KV, for example 10GiB")
    work = parser.add_argument_group("scheduling")
    work.add_argument("--max-cascade-levels", type=int, metavar="N", help="default 3")
    work.add_argument("--max-batch", type=int, metavar="N", help="requests decoded together at most")
    work.add_argument("--max-waiting", type=int, metavar="N", help="requests that may wait; more are refused")
    work.add_argument("--prefill-tokens-max", type=int, metavar="N", help="tokens a prefill forward at most")
    work.add_argument("--strict", action="store_true", help="one batch size for every step: bits never change")
    parser.add_argument("--start-timeout", type=typed(parse_seconds), default=300.0, metavar="SECONDS")
    parser.add_argument(
        "--drain-s", type=typed(parse_seconds), default=20.0, metavar="SECONDS", help="for running requests at the end"
    )
    add_json_flag(parser)


def run(args: argparse.Namespace, terminal: Terminal) -> int:
    require_server()
    check_model_flag(args.model)
    _check_access(args)
    asked = {field.name: getattr(args, field.name) for field in fields(Settings) if field.name in args}
    with private_tokens(args.token_file) as prefill_token_file:
        settings = replace(Settings(**asked), prefill_token_file=prefill_token_file)
        return asyncio.run(_serve(settings, args.start_timeout, args.drain_s + KILL_AFTER_S, terminal))


def _check_access(args: argparse.Namespace) -> None:
    """Raises ``UsageError`` for files that contradict each other or cannot be read; fills in the default authority."""
    if (args.tls_cert is None) != (args.tls_key is None):
        raise UsageError("--tls-cert and --tls-key: give both or neither")
    if args.tls_ca is not None and args.tls_cert is None:
        raise UsageError("--tls-ca: belongs to --tls-cert and --tls-key")
    tokens, tls = args.token_file is not None, args.tls_cert is not None
    refusal = exposure_refusal(args.host, tokens=tokens, tls=tls, insecure=args.insecure)
    if refusal:
        raise UsageError(refusal)
    args.tls_ca = args.tls_ca or args.tls_cert
    for name in ("token_file", "tls_cert", "tls_key", "tls_ca"):
        path = getattr(args, name)
        try:
            _ = path is None or path.read_bytes()
        except OSError as error:
            flag = name.replace("_", "-")
            raise UsageError(f"--{flag}: cannot read {path}: {error.strerror or error}") from error


async def _serve(settings: Settings, start_timeout_s: float, grace_s: float, terminal: Terminal) -> int:
    commands = service_commands(settings)
    as_json = settings.log_format == "json"  # then nothing stands in front of a line
    processes = Processes(lambda service, line: _log(terminal, "" if as_json else service, line))
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
    if other := _dtypes_differ(ready.result()):
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
    places = {
        command.name: {"address": command.address, "metrics": _metrics_url(command, events[command.name])}
        for command in commands
    }
    served = {name: events[commands[0].name].get(name, "") for name in ("dtype", "dtype_reason")}
    if terminal.as_json:
        terminal.json_line({"event": "ready", **places, **served, "seconds": round(seconds, 3)})
        return
    terminal.say(
        f"Ready in {seconds:.1f} s{_words_for(served)}. "
        + " ".join(f"{name} {place['address']} (metrics {place['metrics']})" for name, place in places.items())
    )


def _words_for(served: dict[str, str]) -> str:
    return f" in {served['dtype']} ({served['dtype_reason']})" if served["dtype"] else ""


def _dtypes_differ(events: dict[str, dict[str, Any]]) -> str:
    """Why the services cannot work together, if each chose a dtype of its own; otherwise ""."""
    chosen = {name: event.get("dtype", "") for name, event in events.items()}
    if len(set(chosen.values())) < 2:
        return ""
    said = ", ".join(f"{name} {dtype}" for name, dtype in chosen.items())
    return f"the services chose different dtypes ({said}); give --dtype"


def _metrics_url(command: Command, event: dict[str, Any]) -> str:
    return f"http://{command.address.rpartition(':')[0]}:{event.get('metrics_port')}/metrics"


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
