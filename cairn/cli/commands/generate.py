"""Stream an answer to a prompt built from segments, and say what was reused.

Each SEGMENT is a chunk (its id, the first digits of it, or :NAME), @FILE or text (text:WORDS if it looks like one of
the others), in order. The query comes last: --query, or the last SEGMENT. Or a chat: --messages.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from cairn.cli.arguments import read_file
from cairn.cli.connection import add_connection_flags, open_client
from cairn.cli.segments import add_prompt_flags, read_chat, read_segments
from cairn.cli.terminal import Terminal, chat_line, reuse_table
from cairn.client.answers import Kept, Result
from cairn.client.calls import GenerateOptions
from cairn.client.client import Client
from cairn.client.generation import Generation
from cairn.client.prompt import Grammar
from chunk_store.quantities import human_seconds


def configure(parser: argparse.ArgumentParser) -> None:
    add_prompt_flags(parser)
    group = parser.add_argument_group("sampling")
    group.add_argument("--max-tokens", type=int, default=128, metavar="N")
    group.add_argument("--temperature", type=float, help="default 0: the most likely token")
    group.add_argument("--top-p", type=float)
    group.add_argument("--top-k", type=int)
    group.add_argument("--min-p", type=float)
    group.add_argument("--seed", type=int)
    group.add_argument(
        "--frequency-penalty", type=float, metavar="X", help="-2..2, for each time a token was generated"
    )
    group.add_argument("--presence-penalty", type=float, metavar="X", help="-2..2, once a token was generated")
    group.add_argument("--repetition-penalty", type=float, metavar="X", help="of tokens in prompt and answer; 1: none")
    group.add_argument("--min-tokens", type=int, metavar="N", help="no end before so many tokens")
    group.add_argument(
        "-n", "--n", type=int, default=1, metavar="N", help="answers, each with a seed one larger; at most 16"
    )
    group.add_argument("--stop", action="append", default=[], help="end before this text; may be given several times")
    group.add_argument("--include-stop", action="store_true", help="end behind that text: it is part of the answer")
    group.add_argument(
        "--stop-token-id",
        action="append",
        default=[],
        type=int,
        metavar="TOKEN",
        help="end with this token; may be given several times",
    )
    group.add_argument("--ignore-eos", action="store_true", help="go on after the model's end token")
    group.add_argument("--logprobs", action="store_true", help="log-probability of each token, in --json")
    group.add_argument(
        "--top-logprobs", type=int, default=0, metavar="N", help="those of the N likeliest tokens too, at most 20"
    )
    group.add_argument(
        "--prompt-logprobs",
        type=int,
        metavar="N",
        help="log-probability of each token of the prompt and of the N likeliest (0..20), in --json; computes it anew",
    )
    group.add_argument(
        "--logit-bias",
        action="append",
        default=[],
        type=_bias,
        metavar="TOKEN=BIAS",
        help="add to a token's score, -100..100; may be given several times",
    )
    form = parser.add_argument_group("what the answer must be").add_mutually_exclusive_group()
    form.add_argument("--json-schema", type=Path, metavar="FILE", help="JSON that the schema in a file allows")
    form.add_argument("--json-object", action="store_true", help="any JSON object")
    form.add_argument("--regex", metavar="EXPRESSION", help="a text that a regular expression matches as a whole")
    form.add_argument("--lark", type=Path, metavar="FILE", help="a text that the Lark grammar in a file gives")
    turn = parser.add_argument_group("when its turn comes")
    turn.add_argument("--priority", type=int, default=0, metavar="N", help="0..9, among your requests; higher first")
    turn.add_argument("--start-within-s", type=float, metavar="S", help="fail if it was not begun by then")
    parser.add_argument(
        "--keep", action="store_true", help="make the query and its answer a chunk to name in the next request"
    )
    parser.add_argument("--quiet", action="store_true", help="print the answer only, no report")
    add_connection_flags(parser)


def _grammar(args: argparse.Namespace) -> Grammar | None:
    """Raises ``UsageError`` for a file that cannot be read."""
    if args.json_schema is not None:
        return Grammar.json_schema(read_file(args.json_schema))
    if args.lark is not None:
        return Grammar.lark(read_file(args.lark))
    if args.regex is not None:
        return Grammar.regex(args.regex)
    return Grammar.json_object() if args.json_object else None


def _bias(text: str) -> tuple[int, float]:
    """TOKEN=BIAS."""
    token, equals, bias = text.partition("=")
    if not equals:
        raise argparse.ArgumentTypeError(f"{text!r} is not TOKEN=BIAS")
    try:
        return int(token), float(bias)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not a token id and a number: {error}") from error


def _open(args: argparse.Namespace, client: Client, terminal: Terminal) -> Generation:
    """The answer to what the command line gives, as it comes."""
    chat = read_chat(args)
    if chat is not None:
        messages, own = chat
        return client.chat(messages, **own, **_options(args))
    return client.generate(read_segments(args, client, terminal), **_options(args))


def _options(args: argparse.Namespace) -> GenerateOptions:
    return {
        "max_tokens": args.max_tokens,
        "reuse": args.reuse,
        "cache": args.cache,
        "order": args.order,
        "priority": args.priority,
        "start_within_s": args.start_within_s,
        "request_id": args.request_id,
        "temperature": args.temperature,
        "top_p": args.top_p,
        "top_k": args.top_k,
        "min_p": args.min_p,
        "frequency_penalty": args.frequency_penalty,
        "presence_penalty": args.presence_penalty,
        "repetition_penalty": args.repetition_penalty,
        "min_tokens": args.min_tokens,
        "n": args.n,
        "seed": args.seed,
        "stop": args.stop,
        "include_stop": args.include_stop,
        "prompt_logprobs": args.prompt_logprobs,
        "stop_token_ids": args.stop_token_id,
        "ignore_eos": args.ignore_eos,
        "logprobs": args.logprobs or args.top_logprobs > 0,
        "top_logprobs": args.top_logprobs,
        "logit_bias": dict(args.logit_bias),
        "keep": args.keep,
        "grammar": _grammar(args),
    }


def run(args: argparse.Namespace, terminal: Terminal) -> int:
    with (
        open_client(args) as client,
        _open(args, client, terminal) as stream,
    ):
        for delta in stream:
            if not terminal.as_json and args.n == 1:
                terminal.stream(delta.text)
        results = stream.results
    for result in results:
        if terminal.as_json:
            terminal.json_line(result)
        else:
            _tell(result, args, terminal)
    return 0


def _tell(result: Result, args: argparse.Namespace, terminal: Terminal) -> None:
    """What is said of an answer when it is over; several come whole, one behind the other."""
    terminal.stream("\n" if args.n == 1 else f"[{result.index}] {result.text}\n")
    if result.kept is not None:  # also when quiet: it is what the next request needs
        terminal.note(_kept(result.kept))
    if args.quiet:
        return
    if result.index == 0:
        terminal.note(reuse_table(result.reuse))
        if result.chat is not None:
            terminal.note(chat_line(result.chat))
    terminal.note(_summary(result), style="dim")


def _kept(kept: Kept) -> str:
    if not kept.registered:
        return f"not kept ({kept.reason})"
    why = f", {kept.reason}" if kept.reason else ""
    return f"kept as {kept.id} (KV {kept.kv}{why})"


def _summary(result: Result) -> str:
    usage, timings = result.usage, result.timings
    return (
        f"{usage.prompt_tokens} prompt tokens ({usage.cached_tokens} cached, {usage.computed_tokens} computed), "
        f"{usage.completion_tokens} generated, first token {human_seconds(timings.first_token_s)}, "
        f"total {human_seconds(timings.total_s)}, {result.reuse.exactness}, ended by {result.finish_reason}"
        + (f", set aside {result.preemptions} times" if result.preemptions else "")
    )
