"""The command line: one module a command, parsed by argparse.

Exit codes: 0 it worked, 1 the request failed, 2 the command line was wrong, 130 interrupted.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

from cairn.cli.arguments import UsageError
from cairn.cli.commands import abort, chunks, compare, demo, explain, generate, health, plan, prefill, store, up
from cairn.cli.hints import hint
from cairn.cli.terminal import Terminal
from cairn.client.errors import CairnError

COMMANDS = (up, demo, prefill, generate, explain, abort, chunks, health, store, plan, compare)
OK, FAILED, USAGE, INTERRUPTED = 0, 1, 2, 130


def build_parser() -> argparse.ArgumentParser:
    """The parser of ``cairn`` with a sub-parser for each command."""
    parser = argparse.ArgumentParser(
        prog="cairn",
        description="Serve language models whose prompts are built from parts.",
        epilog="exit codes: 0 it worked, 1 the request failed, 2 the command line was wrong",
    )
    subparsers = parser.add_subparsers(title="commands", dest="command", required=True, metavar="COMMAND")
    for command in COMMANDS:
        subparser = subparsers.add_parser(
            command.NAME,
            help=command.HELP,
            description=command.__doc__,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        command.configure(subparser)
        subparser.set_defaults(run=command.run)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return the exit code."""
    parser = build_parser()
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
        terminal.failed(error, hint(error, _addresses(args), getattr(args, "tls_ca", None)))
        return FAILED
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:  # whoever read the output has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FAILED


def _addresses(args: argparse.Namespace) -> tuple[str, ...]:
    """The services that a command talks to; none for one that works without them."""
    return tuple(getattr(args, name) for name in ("prefill", "decode") if isinstance(getattr(args, name, None), str))
