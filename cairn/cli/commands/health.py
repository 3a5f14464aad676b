"""Ask services for their health (grpc.health.v1); for container health checks and scripts.

Exit code 0 if every one is SERVING, 1 if not.
"""

from __future__ import annotations

import argparse
import time

from cairn.cli.connection import add_connection_flags, connection_options
from cairn.cli.hints import reachability
from cairn.cli.terminal import Terminal
from cairn.client.health import ask_health
from cairn.client.transport import Peer

POLL_S = 0.1


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("address", nargs="*", metavar="HOST:PORT", help="default: the prefill and the decode services")
    parser.add_argument("--wait", type=float, default=0.0, metavar="SECONDS", help="wait this long for them to serve")
    add_connection_flags(parser)


def run(args: argparse.Namespace, terminal: Terminal) -> int:
    options = connection_options(args)
    addresses = args.address or [options.prefill, *options.decodes]
    token = options.bearer()
    ends_at = time.monotonic() + args.wait
    serving = True
    for address in addresses:
        peer = Peer("health", address, options.tls_ca, token)
        with terminal.waiting(f"Waiting for {address} ..."):
            status = _wait_for_serving(peer, ends_at, min(options.timeout, 5.0))
        serving = serving and status == "SERVING"
        terminal.result({"address": address, "status": status}, f"{address} {status}")
        if status == "UNAVAILABLE" and (why := reachability(address, options.tls_ca)):
            terminal.note(why)
    return 0 if serving else 1


def _wait_for_serving(peer: Peer, ends_at: float, timeout_s: float) -> str:
    with peer.open_channel() as channel:
        while (status := ask_health(channel, peer, timeout_s)[0]) != "SERVING" and time.monotonic() < ends_at:
            time.sleep(POLL_S)
    return status
