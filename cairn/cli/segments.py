"""What a command line makes a prompt of: chunks, files and texts, the query last.

A word that looks like a chunk id is one, or the command ends: an id with a typing error in it would otherwise become
part of a prompt without anybody's notice. ``text:WORD`` says that a word is text, whatever it looks like.
"""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path
from typing import Any

from cairn.cli.arguments import UsageError, read_file, shown
from cairn.cli.selection import SEE_CHUNKS, find_chunk, id_of_digits, looks_like_id, registered
from cairn.cli.terminal import Terminal
from cairn.client.calls import ChatOptions
from cairn.client.chunks import ChunkRef
from cairn.client.client import Client
from cairn.client.prompt import CACHE_USES, CHUNK_ORDERS, REUSE_MODES, Text
from cairn.client.requests import Segment

TEXT_PREFIX = "text:"
_PATH = re.compile(r"(~|\.{1,2})?/\S*|\S+/\S*\.[A-Za-z0-9]{1,8}")


def add_segment_flags(parser: argparse.ArgumentParser) -> None:
    """The flags that say what the prompt is made of."""
    parser.add_argument("segment", nargs="*", metavar="SEGMENT", help="a chunk id, :NAME, @FILE or text")
    parser.add_argument("--query", metavar="TEXT", help="the query: text or @FILE")
    parser.add_argument(
        "--segment-role", default="", metavar="ROLE", help="chat role of segments given as text or files"
    )
    parser.add_argument("--query-role", default="", metavar="ROLE", help="chat role of the query, for example user")


def add_prompt_flags(parser: argparse.ArgumentParser) -> None:
    """The flags that say what is sent to the decode service."""
    add_segment_flags(parser)
    parser.add_argument(
        "--messages",
        metavar="FILE",
        type=Path,
        help="a chat instead of segments: a JSON list of messages, or an object with messages, tools, "
        "template_arguments and what else a chat has",
    )
    parser.add_argument("--reuse", choices=REUSE_MODES, default="exact", help="how chunks may be reused")
    parser.add_argument("--cache", choices=CACHE_USES, default="shared", help="bypass: compute everything anew")
    parser.add_argument(
        "--order",
        choices=CHUNK_ORDERS,
        default="given",
        help="canonical: neighbouring chunks of one type may change places, so that prompts begin alike",
    )
    parser.add_argument("--request-id", metavar="ID", help="to find it again in the logs and to abort it")


def prompt_words(args: argparse.Namespace) -> tuple[list[str], str]:
    """The words of the segments before the query, and the query's. Raises ``UsageError`` without a query."""
    if args.query is not None:
        return args.segment, args.query
    if not args.segment:
        raise UsageError("give a query: --query TEXT, or at least one SEGMENT")
    return args.segment[:-1], args.segment[-1]


def read_chat(args: argparse.Namespace) -> tuple[list[Any], ChatOptions] | None:
    """A chat's messages and its own options; None without ``--messages``. Raises ``UsageError``."""
    if args.messages is None:
        return None
    if args.segment or args.query is not None:
        raise UsageError("give either --messages or segments and a query")
    try:
        given = json.loads(read_file(args.messages))
    except ValueError as error:
        raise UsageError(f"{args.messages} is no JSON: {error}") from error
    given = given if isinstance(given, dict) else {"messages": given}
    known = {"messages", *ChatOptions.__annotations__}
    if not isinstance(given.get("messages"), list) or given.keys() - known:
        raise UsageError(
            f"{args.messages} is no chat: a JSON list of messages, or an object of {', '.join(sorted(known))}"
        )
    options: Any = {name: value for name, value in given.items() if name != "messages"}
    return given["messages"], options


def read_segments(args: argparse.Namespace, client: Client, terminal: Terminal) -> list[Segment]:
    """The prompt's segments, the query last. Raises ``UsageError`` as ``prompt_words`` and ``read_segment``."""
    words, query = prompt_words(args)
    segments = [read_segment(word, client, terminal, role=args.segment_role) for word in words]
    return [*segments, read_segment(query, client, terminal, role=args.query_role)]


def read_segment(word: str, client: Client, terminal: Terminal, *, role: str = "") -> Segment:
    """One segment of a prompt: ``:NAME``, a chunk id or its first digits, ``@FILE``, ``text:WORDS``, or text.

    Raises ``UsageError`` for a chunk or a file that is not there.
    """
    if word.startswith(":"):
        return find_chunk(client, word)
    if looks_like_id(word):
        remedy = f"write {TEXT_PREFIX}{word} if it is text; {SEE_CHUNKS}"
        return ChunkRef(id_of_digits(word, registered(client), remedy))
    if word.startswith("@"):
        return Text(read_file(Path(word[1:])), role=role)
    if word.startswith(TEXT_PREFIX):
        return Text(word.removeprefix(TEXT_PREFIX), role=role)
    if _means_a_file(word, terminal):
        return Text(read_file(Path(word).expanduser()), role=role)
    return Text(word, role=role)


def _means_a_file(word: str, terminal: Terminal) -> bool:
    """Whether a word that is written like a path stands for the file's text: asks a person, warns a script."""
    if any(character.isspace() for character in word):
        return False
    try:
        is_file = Path(word).expanduser().is_file()
    except (OSError, RuntimeError, ValueError):  # longer than any path, no such user, a null character
        return False
    if not is_file:
        if _PATH.fullmatch(word) and "://" not in word:
            terminal.warn(f"{shown(word)} looks like a path, but no such file exists: it is sent as text")
        return False
    answer = terminal.ask(f"{shown(word)} is a file. Send its content?")
    if answer is None:
        terminal.warn(f"{shown(word)} is a file, but is sent as text; write @{word} to send its content")
    return bool(answer)
