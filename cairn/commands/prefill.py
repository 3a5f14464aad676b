"""Register chunks and compute their KV, so that the requests that use them find it.

Each CONTENT is text, @FILE, or a chunk (its id, or :NAME) whose KV is wanted under another context.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from cairn.client import Client
from cairn.connection import add_connection_flags, find_chunk, open_client, positive_seconds, read_part
from cairn.terminal import Terminal, short_id, table
from cairn.types import CHUNK_TYPES, REUSE_MODES, Chunk, ChunkRef

NAME = "prefill"
HELP = "register chunks and compute their KV"


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("content", nargs="+", metavar="CONTENT", help="text, @FILE, a chunk id or :NAME")
    parser.add_argument("--type", choices=CHUNK_TYPES, default="context", help="what the chunks are for")
    parser.add_argument("--role", default="", help="render text as one turn of the chat template with this role")
    parser.add_argument("--name", default="", help="name of the chunk (default: the file's name)")
    parser.add_argument("--tag", action="append", default=[], dest="tags", help="may be given several times")
    parser.add_argument(
        "--context", action="append", default=[], metavar="CHUNK", help="id or name of a chunk before it, in order"
    )
    parser.add_argument("--reuse", choices=REUSE_MODES, default="exact", help="which of the context its KV depends on")
    parser.add_argument("--ttl", type=positive_seconds, metavar="SECONDS", help="forget it after this time")
    parser.add_argument("--pin", action="store_true", help="never evict it")
    add_connection_flags(parser)


def run(args: argparse.Namespace, terminal: Terminal) -> int:
    done = []
    with open_client(args) as client:
        context = [find_chunk(client, word) for word in args.context]
        for number, word in enumerate(args.content, start=1):
            with terminal.waiting(f"Prefilling {number} of {len(args.content)} ..."):
                chunk = _prefill(client, args, word, context)
            done.append(chunk)
            if terminal.as_json:
                terminal.json_line(chunk)
    if not terminal.as_json:
        columns = ("chunk", "name", "#tokens", "outcome", "#computed", "#reused", "#ms")
        terminal.say(table(columns, [_row(chunk) for chunk in done]))
        for chunk in done:
            terminal.note(chunk.id)
    return 0


def _prefill(client: Client, args: argparse.Namespace, word: str, context: list[ChunkRef]) -> Chunk:
    name = args.name or (Path(word[1:]).name if word.startswith("@") else "")
    return client.prefill(
        read_part(word, client),
        type=args.type,
        role=args.role,
        name=name,
        tags=args.tags,
        context=context,
        reuse=args.reuse,
        ttl_s=args.ttl,
        pin=args.pin,
    )


def _row(chunk: Chunk) -> tuple[object, ...]:
    return (
        short_id(chunk.id),
        chunk.name,
        chunk.tokens,
        chunk.outcome,
        chunk.computed_tokens,
        chunk.reused_tokens,
        f"{chunk.timings.total_s * 1000:.1f}",
    )
