"""Chunks and tails, cut into pieces of at most ``piece_tokens`` tokens: the same pieces whatever else runs."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from engine.kv.pages import PageRun
from engine.plan import PlacedChunk, StepSequence
from engine.run.protocol import PendingStep, Runner


def prefill_chunk(runner: Runner, token_ids: Sequence[int], context: Sequence[PlacedChunk], run: PageRun) -> None:
    """Computes a chunk's KV into ``run``; its tokens stand behind ``context`` and attend to it.

    In every reuse mode the context of a chunk stands where it was computed: all offsets are 0.
    """
    for first in range(0, len(token_ids), runner.piece_tokens):
        prefill_chunk_piece(runner, token_ids, first, context, run)


def prefill_chunk_piece(
    runner: Runner, token_ids: Sequence[int], first: int, context: Sequence[PlacedChunk], run: PageRun
) -> PendingStep:
    """One piece of ``prefill_chunk``: the tokens from ``first`` on. Raises ``ValueError`` for moved context."""
    if any(chunk.offset for chunk in context):
        raise ValueError("context: chunks that a chunk is computed under stand at their computed places")
    pages = range(run.first, run.first + run.pages)
    start = sum(chunk.tokens for chunk in context)
    return _begin(runner, token_ids, first, context, pages, start, logits=False)


def prefill_tail(
    runner: Runner, token_ids: Sequence[int], context: Sequence[PlacedChunk], pages: Sequence[int], *, start: int
) -> Tensor:
    """Computes a tail's KV into ``pages``, from position ``start``; logits (vocabulary,) fp32 of its last token."""
    if not token_ids:
        raise ValueError("token_ids: at least one token is needed")
    for first in range(0, len(token_ids), runner.piece_tokens):
        step = prefill_piece(runner, token_ids, first, context, pages, start=start)
    return step.logits()[0]


def prefill_piece(
    runner: Runner,
    token_ids: Sequence[int],
    first: int,
    context: Sequence[PlacedChunk],
    pages: Sequence[int],
    *,
    start: int,
) -> PendingStep:
    """One piece of ``prefill_tail``: the tokens from ``first`` on."""
    return _begin(runner, token_ids, first, context, pages, start, logits=True)


def _begin(
    runner: Runner,
    token_ids: Sequence[int],
    first: int,
    context: Sequence[PlacedChunk],
    pages: Sequence[int],
    start: int,
    *,
    logits: bool,
) -> PendingStep:
    piece = token_ids[first : first + runner.piece_tokens]
    sequence = StepSequence(tuple(context), tuple(pages), first, len(piece), start + first)
    return runner.prefill(piece, sequence, logits=logits)
