"""What `cairn bench serve` can be told."""

from __future__ import annotations

import argparse
import json
from contextlib import suppress
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from cairn.cli.arguments import typed
from cairn.client.prompt import CHUNK_ORDERS, REUSE_MODES
from cairn.load.cairn_target import HISTORIES
from cairn.load.figures import BOUNDS
from cairn.load.workload import FIRST_ID, WORKLOADS

APIS = ("chat", "completions")
DURATION_S, DRAIN_S = 60.0, 60.0
VOCABULARY_MIN = 2 * FIRST_ID


def add_load_flags(parser: argparse.ArgumentParser) -> None:
    """Every flag but those of the connection."""
    _add_workload_flags(parser)
    _add_arrival_flags(parser)
    _add_target_flags(parser)
    group = parser.add_argument_group("what is made of it")
    group.add_argument(
        "--goodput", nargs="+", type=typed(_bound), default=[], metavar="NAME:MS",
        help=f"count requests within all these bounds, of {', '.join(BOUNDS)}",
    )  # fmt: skip
    group.add_argument("--processes", type=typed(_count), default=1, metavar="N", help="that ask (default 1)")
    group.add_argument("--out", type=Path, metavar="FILE", help="write the figures as JSON, too")
    group.add_argument("--records", type=Path, metavar="FILE", help="write a JSON line for every request")
    group.add_argument("--plot", type=Path, metavar="FILE", help="draw a PNG (needs matplotlib)")


def _add_workload_flags(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("what is asked (lengths in tokens with --vocabulary, else in words)")
    group.add_argument("workload", nargs="?", choices=WORKLOADS, default="rag", help="default %(default)s")
    group.add_argument("--trace", type=Path, metavar="FILE", help="JSON lines instead of a workload: docs/bench.md")
    group.add_argument("--seed", type=int, default=0, help="another one is other tokens, which no cache knows")
    for name, what in (
        ("system", "the system prompt"),
        ("document", "a document"),
        ("query", "a query"),
        ("output", "an answer"),
    ):
        length = _whole if name == "system" else _count
        group.add_argument(f"--{name}-tokens", type=typed(length), metavar="N", help=f"length of {what}")
    group.add_argument("--documents", type=typed(_count), metavar="N", help="how many there are")
    group.add_argument("--picked", type=typed(_count), metavar="N", help="how many of them a request names")
    group.add_argument("--zipf", type=typed(_number), metavar="X", help="exponent of how often each is named; 0: alike")
    group.add_argument("--turns", type=typed(_count), metavar="N", help="of a conversation")
    group.add_argument("--vocabulary", type=typed(_vocabulary), metavar="N", help="token ids below N instead of words")


def _add_arrival_flags(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("when")
    group.add_argument("--concurrency", type=typed(_count), metavar="N", help="sessions at a time (default 8)")
    group.add_argument("--rate", type=typed(_positive), metavar="X", help="requests/s that arrive by Poisson's law")
    group.add_argument("--speed", type=typed(_positive), metavar="X", help="a trace's times go by X times as fast")
    group.add_argument("--requests", type=typed(_count), metavar="N", help="how many; of a session all are asked")
    group.add_argument("--duration", type=typed(_positive), metavar="S", help=f"how long (default {DURATION_S:g})")
    group.add_argument("--drain", type=typed(_number), default=DRAIN_S, metavar="S", help="then, for what runs")
    group.add_argument("--warm-up", type=typed(_whole), metavar="N", help="sessions before that, not counted")
    group.add_argument("--ahead", action="store_true", help="ask about each document alone before that")


def _add_target_flags(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("whom, and how")
    group.add_argument("--url", type=typed(_url), help="an OpenAI-compatible server: http://HOST:PORT/v1")
    group.add_argument("--api", choices=APIS, help="of --url (default: chat, with --vocabulary completions)")
    group.add_argument("--model", default="", metavar="NAME", help="of --url (default: the first that it lists)")
    group.add_argument("--body", type=typed(_object), default={}, metavar="JSON", help="more of each request to --url")
    group.add_argument("--reuse", choices=REUSE_MODES, default="exact", help="default %(default)s")
    group.add_argument("--order", choices=CHUNK_ORDERS, default="given", help="default %(default)s")
    group.add_argument("--history", choices=HISTORIES, help="earlier turns (default: kept, if --reuse is exact)")
    group.add_argument("--temperature", type=typed(_number), help="default 0: the most likely token")
    group.add_argument("--top-p", type=typed(_positive))
    group.add_argument("--stop-at-eos", action="store_true", help="answers may end before --output-tokens")


def _number(text: str) -> float:
    with suppress(ValueError):
        if 0 <= (number := float(text)) < float("inf"):
            return number
    raise ValueError(f"{text!r} is not a number of at least 0")


def _positive(text: str) -> float:
    if number := _number(text):
        return number
    raise ValueError("0 is not above 0")


def _whole(text: str) -> int:
    with suppress(ValueError):
        if (number := int(text)) >= 0:
            return number
    raise ValueError(f"{text!r} is not a whole number of at least 0")


def _count(text: str) -> int:
    if number := _whole(text):
        return number
    raise ValueError("0 is not at least 1")


def _vocabulary(text: str) -> int:
    if (number := _whole(text)) >= VOCABULARY_MIN:
        return number
    raise ValueError(f"{number} tokens are too few to draw from: at least {VOCABULARY_MIN}")


def _url(text: str) -> str:
    with suppress(ValueError):
        parts = urlsplit(text)
        if parts.scheme in ("http", "https") and parts.hostname and not parts.query and not parts.fragment:
            parts.port  # noqa: B018  # raises for one that is none
            return text.rstrip("/") if parts.path.strip("/") else f"{text.rstrip('/')}/v1"
    raise ValueError(f"{text!r} is no address of an API: write http://HOST:PORT/v1")


def _object(text: str) -> dict[str, Any]:
    with suppress(ValueError):
        if isinstance(found := json.loads(text), dict):
            return found
    raise ValueError(f"{text!r} is no JSON object")


def _bound(text: str) -> tuple[str, float]:
    name, _, ms = text.partition(":")
    if name not in BOUNDS:
        raise ValueError(f"{text!r} is no bound: write NAME:MS with one of {', '.join(BOUNDS)}")
    return name, _positive(ms)
