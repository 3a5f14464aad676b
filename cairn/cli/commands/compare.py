"""Show where two ways of answering one request part: K, V and hidden states by layer and token.

Runs here on a model directory; no service is asked. Each SEGMENT is @FILE or text (text:WORDS if it looks like
something else), or a chunk of the store (its id, the first digits of it, or :NAME), in order; the query comes last:
--query, or the last SEGMENT. A WAY is one of

  fresh:MODE    our engine computes everything                (MODE alone means this)
  stored:MODE   our engine loads the KV that --store has, and computes the rest
  eager:MODE    transformers' own eager attention under the mode's mask

with MODE exact, anchored or independent (exact if left out). A difference is in root mean squares of the token's own
vector; keys of moved chunks are turned to where they stand first. What says how the model is run must be as the
services have it, or their keys are others. docs/compare.md says how to read it.

Exit codes: 0 nothing is beyond the tolerance, 1 something is, 2 the command line was wrong.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cairn.cli.arguments import UsageError, read_file
from cairn.cli.connection import add_json_flag, check_model_flag
from cairn.cli.segments import TEXT_PREFIX, add_segment_flags, prompt_words
from cairn.cli.selection import looks_like_id
from cairn.cli.stores import choose_chunks, opened, options_from
from cairn.cli.terminal import Terminal, table
from serving.process.options import ModelOptions, StoreOptions
from serving.process.settings import settings_of
from serving.process.sources import add_flags

if TYPE_CHECKING:
    from cairn.local.comparison import Comparison
    from engine.compare.divergence import Place
    from engine.served import ServedModel
    from text.codec import TextCodec

KINDS = ("K", "V", "hidden")


def configure(parser: argparse.ArgumentParser) -> None:
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    add_segment_flags(parser)
    parser.add_argument("--a", default="fresh:exact", metavar="WAY", help="default %(default)s")
    parser.add_argument("--b", default="eager:exact", metavar="WAY", help="default %(default)s")
    parser.add_argument("--tolerance", type=float, metavar="X", help="default: the dtype's; 0 for stored against fresh")
    parser.add_argument("--png", type=Path, metavar="FILE", help="also draw a heat map (needs matplotlib)")
    parser.add_argument("--salt", default="", help="that stored KV was computed under")
    add_flags(parser, settings_of(ModelOptions))
    add_json_flag(parser)


def run(args: argparse.Namespace, terminal: Terminal) -> int:
    options = options_from(ModelOptions, args)
    check_model_flag(options.model)
    if args.tolerance is not None and not 0 <= args.tolerance < float("inf"):
        raise UsageError(f"--tolerance: {args.tolerance:g} must be 0 or more")
    # Here, not above: torch takes a second, and no other command needs it.
    from cairn.local.comparison import read_way, run_comparison
    from cairn.local.heatmap import check, draw

    try:
        if args.png is not None:
            check()
        ways = read_way(args.a), read_way(args.b)
        with terminal.waiting("Loading the model ..."):
            served, codec = _load(options)
        names, segments = _segments(args, codec, options)
        with terminal.waiting("Answering both ways ..."):
            found = run_comparison(
                served, segments, ways, store=opened(options), salt=args.salt, tolerance=args.tolerance
            )
        if args.png is not None:
            draw(found, args.png)
    except (ValueError, OSError) as error:
        raise UsageError(str(error)) from error
    _say(found, names, terminal)
    return 1 if found.found.beyond(found.tolerance) else 0


def _load(options: ModelOptions) -> tuple[ServedModel, TextCodec]:
    """The model and its tokenizer as a service has them, without the start check."""
    import torch
    from transformers import logging

    from engine.model.borrowed import BorrowedModel
    from engine.served import look_into
    from text.codec import TextCodec

    logging.disable_progress_bar()
    torch.set_num_threads(options.threads)
    codec = TextCodec.load(options.model)
    borrowed = BorrowedModel.load(options.model, dtype=options.dtype, device=options.device, lora=options.lora)
    return look_into(borrowed, piece_tokens=options.piece_tokens, attention=options.attention), codec


def _segments(
    args: argparse.Namespace, codec: TextCodec, store: StoreOptions
) -> tuple[list[str], list[tuple[int, ...]]]:
    """What to call the segments, and their tokens; the query is the last."""
    words, query = prompt_words(args)
    named = [_segment(word, args, codec, store) for word in words]
    tokens = codec.encode(_text(query), role=args.query_role, generation_prompt=bool(args.query_role))
    if not tokens:
        raise UsageError("--query: holds no token")
    return [*(name for name, _ in named), "(query)"], [*(segment for _, segment in named), tokens]


def _segment(word: str, args: argparse.Namespace, codec: TextCodec, place: StoreOptions) -> tuple[str, tuple[int, ...]]:
    if word.startswith(":") or looks_like_id(word):
        with opened(place) as store:
            (record,) = store.get_records(choose_chunks(store, [word], []))
        if record is None or record.tokenizer != codec.identity:
            raise UsageError(f"{word}: is not registered any more, or with another tokenizer")
        return record.name or record.chunk_id[:12], record.token_ids
    tokens = codec.encode(_text(word), role=args.segment_role)
    if not tokens:
        raise UsageError(f"{word!r}: holds no token")
    return (word if len(word) <= 24 else f"{word[:21]}..."), tokens


def _text(word: str) -> str:
    return read_file(Path(word[1:])) if word.startswith("@") else word.removeprefix(TEXT_PREFIX)


def _say(found: Comparison, names: list[str], terminal: Terminal) -> None:
    first = found.found.first(found.tolerance)
    layers = len(found.found.differences["K"])
    if terminal.as_json:
        terminal.json_line(_as_json(found, names, first, layers))
        return
    terminal.say(table(("layer", *(f"#{kind}  at" for kind in KINDS)), [_layer_row(found, n) for n in range(layers)]))
    terminal.say(
        table(
            ("segment", "#tokens", *(f"#{kind}" for kind in KINDS), str(found.a), str(found.b)),
            _segment_rows(found, names),
        )
    )
    left, right = found.found.likeliest
    same = f"both choose token {left}" if left == right else f"they choose tokens {left} and {right}"
    terminal.say(f"logits differ by {found.found.logits:.2g} standard deviations; {same}")
    if first is None:
        terminal.say(f"nothing is beyond the tolerance of {found.tolerance:g} ({found.dtype})", "bold green")
        return
    segment, place = found.segment_of(first.token)
    terminal.say(
        f"first beyond the tolerance of {found.tolerance:g} ({found.dtype}): {first.kind} of layer {first.layer} at "
        f"token {first.token} (token {place} of {names[segment]}), {first.difference:.3g}; "
        f"{found.found.beyond(found.tolerance)} places in all",
        "bold red",
    )


def _layer_row(found: Comparison, layer: int) -> list[str]:
    cells = []
    for kind in KINDS:
        place = found.found.largest(kind, layer)
        cells.append("-" if place is None else f"{place.difference:.2g}  {place.token:5d}")
    return [str(layer), *cells]


def _segment_rows(found: Comparison, names: list[str]) -> list[list[str]]:
    rows, start = [], 0
    for index, (name, length) in enumerate(zip(names, found.lengths, strict=True)):
        tokens = slice(start, start + length)
        cells = [_largest(found, kind, tokens) for kind in KINDS]
        sources = [(found.sources_a, found.sources_b)[side][index : index + 1] or ["computed"] for side in (0, 1)]
        rows.append([name, str(length), *cells, *(source[0] for source in sources)])
        start += length
    return rows


def _largest(found: Comparison, kind: str, tokens: slice) -> str:
    layers = range(len(found.found.differences[kind]))
    places = [place for layer in layers if (place := found.found.largest(kind, layer, tokens)) is not None]
    return f"{max(place.difference for place in places):.2g}" if places else "-"


def _as_json(found: Comparison, names: list[str], first: Place | None, layers: int) -> dict[str, Any]:
    return {
        "a": str(found.a),
        "b": str(found.b),
        "dtype": found.dtype,
        "tolerance": found.tolerance,
        "segments": [{"name": name, "tokens": length} for name, length in zip(names, found.lengths, strict=True)],
        "sources_a": found.sources_a,
        "sources_b": found.sources_b,
        "first": first,
        "beyond": found.found.beyond(found.tolerance),
        "logits": found.found.logits,
        "likeliest": found.found.likeliest,
        "layers": [{kind: found.found.largest(kind, layer) for kind in KINDS} for layer in range(layers)],
    }
