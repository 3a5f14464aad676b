"""Register chunks and compute their KV, so that the requests that use them find it.

Each CONTENT is text, @FILE, or a chunk (its id, the first digits of it, or :NAME) whose KV is wanted under another
context.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from cairn.cli.arguments import typed
from cairn.cli.connection import add_connection_flags, open_client
from cairn.cli.segments import read_segment
from cairn.cli.selection import find_chunk
from cairn.cli.terminal import Terminal, short_id, table
from cairn.client.chunks import CHUNK_TYPES, Chunk, ChunkRef
from cairn.client.client import Client
from cairn.client.prompt import REUSE_MODES
from cairn.client.requests import Segment
from chunk_store.quantities import human_seconds, parse_seconds


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
    parser.add_argument(
        "--ttl", type=typed(parse_seconds), metavar="DURATION", help="forget it after this time: 90, 15m, 2h, 7d"
    )
    parser.add_argument("--pin", action="store_true", help="never evict it")
    parser.add_argument("--durable", action="store_true", help="wait until the KV is stored, not just computed")
    parser.add_argument("--shared", action="store_true", help="for every tenant to use (tokens marked admin)")
    add_connection_flags(parser)


def run(args: argparse.Namespace, terminal: Terminal) -> int:
    done = []
    with open_client(args) as client:
        context = [find_chunk(client, word) for word in args.context]
        contents = [(word, read_segment(word, client, terminal)) for word in args.content]  # may ask
        for number, (word, content) in enumerate(contents, start=1):
            with terminal.waiting(f"Prefilling {number} of {len(contents)} ..."):
                chunk = _prefill(client, args, word, content, context)
            done.append(chunk)
            if terminal.as_json:
                terminal.json_line(chunk)
    if not terminal.as_json:
        columns = ("chunk", "name", "#tokens", "outcome", "#computed", "#reused", "#time")
        terminal.say(table(columns, [_row(chunk) for chunk in done]))
        for chunk in done:
            terminal.note(chunk.id)
    return 0


def _prefill(client: Client, args: argparse.Namespace, word: str, content: Segment, context: list[ChunkRef]) -> Chunk:
    name = args.name or (Path(word[1:]).name if word.startswith("@") else "")
    return client.prefill(
        content,
        type=args.type,
        role=args.role,
        name=name,
        tags=args.tags,
        context=context,
        reuse=args.reuse,
        ttl_s=args.ttl,
        pin=args.pin,
        shared=args.shared,
        durable=args.durable,
    )


def _row(chunk: Chunk) -> tuple[object, ...]:
    return (
        short_id(chunk.id),
        chunk.name,
        chunk.tokens,
        chunk.outcome if chunk.durable else f"{chunk.outcome}, being stored",
        chunk.computed_tokens,
        chunk.reused_tokens,
        human_seconds(chunk.timings.total_s),
    )
