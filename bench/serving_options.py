"""What ``bench.serving`` can be told."""

from __future__ import annotations

import argparse
import os
from contextlib import suppress
from pathlib import Path

from bench.serving_load import MODES, ORDERS
from bench.serving_services import Layout
from bench.traces import TRACES

FOLDER = Path("/tmp/cairn-8b")
RESULTS, SMALL = Path("bench/results"), Path("build/serving")
HISTORIES = {"chunks": "history as chunks", "tail": "history in the tail", "kept": "history kept"}


def parse(argv: list[str] | None, description: str | None) -> argparse.Namespace:
    """``python -m bench.serving``'s arguments; ends the process if they are wrong."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--traces", nargs="+", choices=TRACES, default=list(TRACES))
    parser.add_argument("--mode", choices=MODES, help="of every trace; default exact, and rag independent, too")
    parser.add_argument("--history", nargs="+", choices=HISTORIES, default=list(HISTORIES), help="of agents' turns")
    order_help = "of rag's documents in EXACT; canonical: the service may sort them"
    parser.add_argument("--order", nargs="+", choices=ORDERS, default=["given"], help=order_help)
    rates_help = "Poisson runs, too: requests/s, or 0.8x the closed loop's"
    parser.add_argument("--rate", nargs="*", type=rate_of, default=[], metavar="RATE", help=rates_help)
    ahead_help = "ask about each document alone before a run, so that none is new in it"
    parser.add_argument("--ahead", action="store_true", help=ahead_help)
    parser.add_argument("--scale", type=above_zero, default=1.0, help="of lengths, requests and concurrency")
    counts_help = "of requests and concurrency, where that is another than --scale"
    parser.add_argument("--counts", type=above_zero, help=counts_help)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--prefill-device", metavar="DEVICE", help="another card for the prefill service: cuda:1")
    parser.add_argument("--one-process", action="store_true", help="both services in one process, over one model")
    parser.add_argument(
        "--model", type=Path, help="a checkpoint (default: fable on a CPU, a random 8B shape elsewhere)"
    )
    parser.add_argument("--folder", type=Path, default=FOLDER, help="of the random checkpoint")
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
    parser.add_argument(
        "--out", type=Path, help=f"folder (default {RESULTS}; of small runs and on a CPU build/serving)"
    )
    args = parser.parse_args(argv)
    if args.one_process and args.prefill_device not in (None, args.device):
        parser.error("--one-process has one device: leave out --prefill-device")
    args.layout = Layout(args.device, args.prefill_device or args.device, args.one_process)
    args.out = args.out or (RESULTS if is_recorded(args) else SMALL)
    return args


def is_recorded(args: argparse.Namespace) -> bool:
    """Whether what is measured is what was recorded: whole traces on a card."""
    return bool(args.scale == 1.0 and args.counts in (None, 1.0) and args.device != "cpu")


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
