"""Compute what a model's KV takes: bytes a token, what a store must hold, the network a time to first token needs.

Reads the configuration of a model only, no weights; no service has to run. KV is counted in the dtype that a service on
this machine would take (--device, --dtype). A request is --chunks chunks of --tokens
tokens each, none of them in the decode service's memory; --documents such chunks are stored, each under --contexts
different contexts (1 in the reuse modes anchored and independent). Formulas: docs/scaling.md.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from cairn.cli.arguments import UsageError, typed
from cairn.cli.connection import add_json_flag
from cairn.cli.terminal import Terminal, table
from cairn.local.geometry import layout_from_config, read_config, served_dtype
from chunk_store.layout import DTYPE_BYTES, KVLayout
from chunk_store.quantities import human_bytes, parse_nbytes, parse_rate
from chunk_store.tools.capacity import Workload, entries_that_fit, entry_nbytes, load_s, plan

CAPACITY_DEFAULT = "16GiB"  # of a new store


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", type=Path, metavar="MODEL_DIR_OR_CONFIG", help="a model directory or its config.json")
    parser.add_argument(
        "--dtype", choices=("auto", *DTYPE_BYTES), default="auto", help="of weights and KV (default: as the services)"
    )
    parser.add_argument("--device", default="cpu", help="that the services run on: cpu (default) or cuda")
    parser.add_argument("--chunks", type=_count, default=8, metavar="N", help="of a request (default %(default)s)")
    parser.add_argument("--tokens", type=_count, default=2048, metavar="N", help="of a chunk (default %(default)s)")
    time = parser.add_argument_group("network")
    time.add_argument("--ttft-ms", type=_positive, metavar="MS", help="the time to first token to be reached")
    time.add_argument("--forward-ms", type=_number, default=0.0, metavar="MS", help="of it not spent on loading KV")
    time.add_argument("--requests-per-s", type=_positive, metavar="N", help="what all of them move together")
    time.add_argument("--bandwidth", type=typed(parse_rate), metavar="RATE", help="what there is, for example 25Gbit/s")
    time.add_argument("--prefill-tokens-per-s", type=_positive, metavar="N", help="when is loading worth it?")
    store = parser.add_argument_group("store")
    store.add_argument(
        "--capacity", type=typed(parse_nbytes), default=CAPACITY_DEFAULT, metavar="BYTES", help="default %(default)s"
    )
    store.add_argument("--documents", type=_count, metavar="N", help="how many chunks it is to hold")
    store.add_argument("--contexts", type=_positive, default=1.0, metavar="N", help="of each (default %(default)g)")
    add_json_flag(parser)


def run(args: argparse.Namespace, terminal: Terminal) -> int:
    try:
        with terminal.waiting("Reading the configuration ..."):
            config = read_config(args.model)
            dtype, reason = _dtype(args, config)
        found = {
            **{"model_type": config.model_type, "device": args.device, "dtype_reason": reason},
            **_compute(args, layout_from_config(config, dtype)),
        }
    except ValueError as error:
        raise UsageError(str(error)) from error
    terminal.result(found, table(("what", "#value"), _rows(found)))
    terminal.note(f"{dtype} on {args.device}: {reason}", "dim")
    return 0


def _dtype(args: argparse.Namespace, config: Any) -> tuple[str, str]:
    """The dtype that is served, and why: as told, else what the services choose here. Raises ``ValueError``."""
    if args.device.partition(":")[0] not in ("cpu", "cuda"):
        raise ValueError(f"--device: {args.device!r} is not cpu, cuda or cuda:N")
    if args.dtype != "auto":
        return args.dtype, "asked for"
    return served_dtype(config, args.model, args.device)


def _compute(args: argparse.Namespace, layout: KVLayout) -> dict[str, Any]:
    """Every number that the flags ask for; None for what they do not. Raises ``ValueError``."""
    loaded = args.chunks * args.tokens
    loading_s = None if args.ttft_ms is None else (args.ttft_ms - args.forward_ms) / 1e3
    if loading_s is not None and loading_s <= 0:
        raise ValueError(f"--forward-ms: {args.forward_ms:g} leaves nothing of a TTFT of {args.ttft_ms:g} ms")
    needs = plan(
        layout,
        Workload(
            documents=args.documents or 1,
            tokens_per_document=args.tokens,
            contexts=args.contexts,
            tokens_loaded=loaded,
            requests_per_s=args.requests_per_s or 0.0,
            load_s_max=loading_s or 1.0,
            prefill_tokens_per_s=args.prefill_tokens_per_s or 0.0,
        ),
    )
    reached_s = None if args.bandwidth is None else load_s(layout, loaded, args.bandwidth) + args.forward_ms / 1e3
    return {
        "dtype": layout.dtype,
        "layers": len(layout.layers),
        "token_nbytes": needs.token_nbytes,
        "chunks": args.chunks,
        "tokens": args.tokens,
        "chunk_nbytes": entry_nbytes(layout, args.tokens),
        "request_nbytes": loaded * needs.token_nbytes,
        "capacity_nbytes": args.capacity,
        "chunks_that_fit": entries_that_fit(layout, args.tokens, args.capacity),
        "documents": args.documents,
        "contexts": args.contexts,
        "store_nbytes": args.documents and needs.store_nbytes,
        "ttft_ms": args.ttft_ms,
        "forward_ms": args.forward_ms,
        "rate_for_ttft": loading_s and needs.first_token_rate,
        "requests_per_s": args.requests_per_s,
        "rate_sustained": args.requests_per_s and needs.sustained_rate,
        "bandwidth": args.bandwidth,
        "ttft_ms_reached": reached_s and reached_s * 1e3,
        "rate_break_even": needs.break_even_rate,
    }


def _rows(found: dict[str, Any]) -> list[tuple[str, str]]:
    tokens, chunks = found["tokens"], found["chunks"]
    rows = [
        ("model", f"{found['model_type']}, {found['layers']} layers, {found['dtype']}"),
        ("KV of a token", _size(found["token_nbytes"])),
        (f"a stored chunk of {tokens} tokens", _size(found["chunk_nbytes"])),
        (f"a request of {chunks} such chunks moves", _size(found["request_nbytes"])),
        (f"such chunks in a store of {human_bytes(found['capacity_nbytes'])}", f"{found['chunks_that_fit']}"),
    ]
    if found["store_nbytes"]:
        words = f"store for {found['documents']} of them under {found['contexts']:g} contexts each"
        rows.append((words, _size(found["store_nbytes"])))
    if found["rate_for_ttft"]:
        rows.append((f"network for a TTFT of {found['ttft_ms']:g} ms", _rate(found["rate_for_ttft"])))
    if found["rate_sustained"]:
        rows.append((f"network for {found['requests_per_s']:g} requests a second", _rate(found["rate_sustained"])))
    if found["ttft_ms_reached"]:
        rows.append((f"TTFT over {_rate(found['bandwidth'])}", f"{found['ttft_ms_reached']:.1f} ms"))
    if found["rate_break_even"]:
        rows.append(("loading is faster than prefill from", _rate(found["rate_break_even"])))
    return rows


def _size(count: int) -> str:
    return f"{count} B" if count < 1024 else f"{human_bytes(count)} ({count} B)"


def _rate(rate: float) -> str:
    return f"{rate / 1e9:.3g} GB/s ({rate * 8 / 1e9:.3g} Gbit/s)"


def _count(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number} is not at least 1")
    return number


def _number(text: str) -> float:
    number = float(text)
    if not 0 <= number < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is not a number of at least 0")
    return number


def _positive(text: str) -> float:
    number = _number(text)
    if not number:
        raise argparse.ArgumentTypeError("0 is not a positive number")
    return number
