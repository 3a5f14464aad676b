"""Say what a request would reuse, compute and move, without running it.

Each SEGMENT is a chunk (its id, the first digits of it, or :NAME), @FILE or text (text:WORDS if it looks like one of
the others), in order. The query comes last: --query, or the last SEGMENT. Or a chat: --messages.
"""

from __future__ import annotations

import argparse
from contextlib import ExitStack
from typing import Any

from cairn.cli.connection import add_connection_flags, open_client
from cairn.cli.segments import add_prompt_flags, read_chat, read_segments
from cairn.cli.terminal import Terminal, chat_line, reuse_table
from chunk_store.quantities import human_bytes


def configure(parser: argparse.ArgumentParser) -> None:
    add_prompt_flags(parser)
    add_connection_flags(parser)


def run(args: argparse.Namespace, terminal: Terminal) -> int:
    with open_client(args) as client, ExitStack() as shown:
        chat = read_chat(args)
        segments = [] if chat else read_segments(args, client, terminal)  # may ask
        shown.enter_context(terminal.waiting("Looking up ..."))
        options: Any = {name: getattr(args, name) for name in ("reuse", "cache", "order", "request_id")}
        if chat is None:
            plan = client.explain(segments, **options)
        else:
            plan = client.explain_chat(chat[0], **chat[1], **options)
    if terminal.as_json:
        terminal.json_line(plan)
        return 0
    terminal.say(reuse_table(plan.reuse))
    if plan.chat is not None:
        terminal.say(chat_line(plan.chat))
    terminal.say(
        f"{plan.prompt_tokens} prompt tokens: {plan.cached_tokens} cached, {plan.computed_tokens} to compute "
        f"({plan.reuse.exactness})"
    )
    terminal.say(
        f"load {human_bytes(plan.bytes_to_load)}, compute {human_bytes(plan.bytes_to_compute)}; a decode step reads "
        f"{human_bytes(plan.bytes_read_per_step)}, of which {human_bytes(plan.bytes_shared_per_step)} are read anyway"
    )
    return 0
