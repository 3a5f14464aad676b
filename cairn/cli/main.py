"""The command line: one module a command, parsed by argparse.

Exit codes: 0 it worked, 1 the request failed, 2 the command line was wrong, 130 interrupted.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from importlib import import_module

from cairn.cli import commands
from cairn.cli.arguments import UsageError
from cairn.cli.connection import connection_options
from cairn.cli.extras import remedy
from cairn.cli.hints import hint
from cairn.cli.terminal import Terminal
from cairn.cli.version import PrintVersions
from cairn.client.errors import CairnError

COMMANDS = {  # a module each
    "up": "start the two services on this machine",
    "demo": "start everything, ask questions, compare with transformers",
    "prefill": "register chunks and compute their KV",
    "generate": "stream an answer to chunks and a query",
    "explain": "show what a request would reuse, without running it",
    "abort": "end waiting or running generations",
    "chunks": "list, show, pin, unpin and remove chunks",
    "health": "ask the services whether they are serving",
    "store": "look after a chunk store: stats, verify, gc, export, import, rm",
    "plan": "compute bytes a token, capacity and network for a model",
    "bench": "put a load on services and measure them",
    "compare": "show where two ways of answering a request part, layer by layer",
}
OK, FAILED, USAGE, INTERRUPTED = 0, 1, 2, 130


def build_parser(chosen: str) -> argparse.ArgumentParser:
    """The parser of ``cairn``. Only the chosen command is imported: what the others need may not be installed."""
    parser = argparse.ArgumentParser(
        prog="cairn",
        description="Serve language models whose prompts are built from segments.",
        epilog="exit codes: 0 it worked, 1 the request failed, 2 the command line was wrong",
    )
    parser.add_argument("--version", action=PrintVersions, nargs=0, help="of the package, the protocol and the store")
    subparsers = parser.add_subparsers(title="commands", dest="command", required=True, metavar="COMMAND")
    for name, words in COMMANDS.items():
        subparser = subparsers.add_parser(name, help=words, formatter_class=argparse.RawDescriptionHelpFormatter)
        if name == chosen:
            command = import_module(f"{commands.__name__}.{name}")
            subparser.description = command.__doc__
            command.configure(subparser)
            subparser.set_defaults(run=command.run)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return the exit code."""
    argv = sys.argv[1:] if argv is None else argv
    chosen = next((word for word in argv if not word.startswith("-")), "")
    try:
        return _run(build_parser(chosen), argv)
    except ModuleNotFoundError as error:
        if words := remedy(error, chosen):
            Terminal().failed(UsageError(words))
            return USAGE
        raise


def _run(parser: argparse.ArgumentParser, argv: Sequence[str]) -> int:
    try:
        args = parser.parse_args(argv)
    except SystemExit as stop:  # argparse has said what was wrong, or printed its help
        return stop.code if isinstance(stop.code, int) else USAGE
    terminal = Terminal(as_json=args.json)
    try:
        return int(args.run(args, terminal))
    except UsageError as error:
        terminal.failed(error)
        return USAGE
    except CairnError as error:
        terminal.failed(error, _hint(error, args))
        return FAILED
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:  # whoever read the output has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FAILED


def _hint(error: CairnError, args: argparse.Namespace) -> str:
    """What to do about an error of a command that talks to the services; "" for one that works without them."""
    if "decode" not in args:
        return ""
    options = connection_options(args)
    return hint(error, (options.prefill, *options.decodes), options.tls_ca)
