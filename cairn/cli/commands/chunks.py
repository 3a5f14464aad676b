"""List, show, pin, unpin and remove registered chunks.

A CHUNK is its name (or :NAME), its id, or the first 6 digits of its id.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from itertools import islice

from cairn.cli.arguments import UsageError
from cairn.cli.connection import add_connection_flags, open_client
from cairn.cli.selection import choose_ids, find_chunk, registered
from cairn.cli.terminal import Terminal, human_time, short_id, table
from cairn.client.chunks import CHUNK_TYPES, LIST_ORDERS, StoredChunk
from cairn.client.client import Client
from chunk_store.quantities import human_age, human_bytes


def configure(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    listing = actions.add_parser("list", help="list chunks")
    listing.add_argument("--type", choices=CHUNK_TYPES, default="")
    listing.add_argument("--tag", default="")
    listing.add_argument("--name", default="")
    listing.add_argument(
        *("--by", "--order"),
        dest="order",
        type=lambda word: word.replace("-", "_"),
        choices=LIST_ORDERS,
        default="created",
        metavar="ORDER",
        help="created (default), last-used (eviction order: the next to go first) or name",
    )
    listing.add_argument("--limit", type=int, metavar="N", help="at most so many")
    showing = actions.add_parser("show", help="show one chunk")
    showing.add_argument("chunk", metavar="CHUNK")
    showing.add_argument("--text", action="store_true", help="its text too")
    showing.add_argument("--token-ids", action="store_true", help="its token ids too")
    removing = actions.add_parser(
        "rm", usage="cairn chunks rm [-h] [CHUNK ...] [--tag TAG] [options]", help="remove chunks and their KV"
    )
    removing.add_argument("chunk", nargs="*", metavar="CHUNK")
    removing.add_argument("--tag", action="append", default=[], metavar="TAG", help="all that bear it; may be repeated")
    for action, words in (("pin", "never evict"), ("unpin", "allow eviction")):
        several = actions.add_parser(action, help=words)
        several.add_argument("chunk", nargs="+", metavar="CHUNK")
    for subparser in actions.choices.values():
        add_connection_flags(subparser)


def run(args: argparse.Namespace, terminal: Terminal) -> int:
    actions: dict[str, Callable[[argparse.Namespace, Terminal, Client], None]] = {
        "list": _list,
        "show": _show,
        "rm": _remove,
        "pin": _pin,
        "unpin": _pin,
    }
    with open_client(args) as client:
        actions[args.action](args, terminal, client)
    return 0


def _list(args: argparse.Namespace, terminal: Terminal, client: Client) -> None:
    found = islice(client.chunks(type=args.type, tag=args.tag, name=args.name, order=args.order), args.limit)
    if terminal.as_json:
        for chunk in found:
            terminal.json_line(chunk)
        return
    columns = ("chunk", "name", "type", "tags", "#tokens", "pinned", "#contexts", "#stored", "#used")
    with terminal.waiting("Listing ..."):
        rows = [_row(chunk) for chunk in found]
    terminal.say(table(columns, rows))


def _row(chunk: StoredChunk) -> tuple[object, ...]:
    return (
        short_id(chunk.id),
        chunk.name,
        chunk.type,
        ",".join(chunk.tags),
        chunk.tokens,
        "yes" if chunk.pinned else "",
        chunk.kv_entries,
        human_bytes(chunk.kv_bytes),
        f"{human_age(time.time() - chunk.last_used_unix_s)} ago",
    )


def _show(args: argparse.Namespace, terminal: Terminal, client: Client) -> None:
    chunk = client.get(find_chunk(client, args.chunk), token_ids=args.token_ids, text=args.text)
    if terminal.as_json:
        terminal.json_line(chunk)
        return
    hidden = {"text"} if args.token_ids else {"text", "token_ids"}
    rows = [(_label(name), _value(chunk, name)) for name in chunk.__dataclass_fields__ if name not in hidden]
    terminal.say(table(("field", "value"), rows))
    if args.text:
        terminal.say(chunk.text)


def _label(field: str) -> str:
    return field.removesuffix("_unix_s").replace("_", " ")


def _value(chunk: StoredChunk, field: str) -> object:
    """A field for a person: points in time by the clock, sizes in units, lists in words."""
    value = getattr(chunk, field)
    if field.endswith("_unix_s"):
        return "never" if value is None else human_time(value, time.time())
    if field.endswith("_bytes"):
        return human_bytes(value)
    if isinstance(value, bool):
        return "yes" if value else "no"
    return ", ".join(value) if field == "tags" else value


def _remove(args: argparse.Namespace, terminal: Terminal, client: Client) -> None:
    if not args.chunk and not args.tag:
        raise UsageError("rm: name chunks (CHUNK ...) or give --tag TAG")
    for chunk_id in choose_ids(args.chunk, args.tag, registered(client)):
        freed = client.delete(chunk_id)
        terminal.result(
            {"id": chunk_id, "kv_entries": freed.kv_entries, "kv_bytes": freed.kv_bytes},
            f"removed {short_id(chunk_id)}: {freed.kv_entries} KV entries, {human_bytes(freed.kv_bytes)}",
        )


def _pin(args: argparse.Namespace, terminal: Terminal, client: Client) -> None:
    for word in args.chunk:
        chunk = find_chunk(client, word)
        record = client.pin(chunk) if args.action == "pin" else client.unpin(chunk)
        terminal.result(record, f"{short_id(record.id)} is {'pinned' if record.pinned else 'not pinned'}")
