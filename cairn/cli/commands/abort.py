"""Abort generations by the request ids that they were started with.

Exit code 0 if each was found waiting or running, 1 if one was not.
"""

from __future__ import annotations

import argparse

from cairn.cli.connection import add_connection_flags, open_client
from cairn.cli.terminal import Terminal


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("request_id", nargs="+", metavar="REQUEST_ID", help="as `generate --request-id` gave it")
    add_connection_flags(parser)


def run(args: argparse.Namespace, terminal: Terminal) -> int:
    everyone = True
    with open_client(args) as client:
        for request_id in args.request_id:
            found = client.abort(request_id)
            everyone = everyone and found
            words = "aborted" if found else "is not waiting or running"
            terminal.result({"request_id": request_id, "found": found}, f"{request_id} {words}")
    return 0 if everyone else 1
