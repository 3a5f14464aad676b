"""Chunks and tails as rows of steps, cut as the runner says: the same pieces whatever else runs, or any slices."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from torch import Tensor

from engine.kv.pages import PageRun
from engine.plan import PlacedChunk, StepSequence
from engine.run.protocol import Runner, StepRows
from engine.sampling.params import Draw, SamplingParams, SamplingRequest

GREEDY = SamplingRequest(SamplingParams(), (), frozenset())


@dataclass(frozen=True)
class Cut:
    """``rows`` tokens from ``first`` on of a chunk or a tail; ``alone``: in a forward of their own."""

    first: int
    rows: int
    alone: bool


def cuts(runner: Runner, context: Sequence[PlacedChunk], tokens: int, *, chunk: bool) -> Iterator[Cut]:
    """How a chunk, or a tail, of ``tokens`` tokens is computed where nothing else is."""
    alone = runner.alone(tokens, chunk=chunk)
    behind = [placed.tokens for placed in context]
    first = 0
    while first < tokens:
        left = tokens - first
        rows = min(left, runner.piece_tokens) if alone else runner.room(decoding=False).take(behind, first, left)
        yield Cut(first, rows, alone)
        first += rows


def prefill_chunk(
    runner: Runner, token_ids: Sequence[int], context: Sequence[PlacedChunk], run: PageRun, start: int | None = None
) -> None:
    """Computes a chunk's KV into ``run``; its tokens stand behind ``context`` and attend to it, or from ``start`` on,
    where the first chunks of the context are left out because none of its rows sees them.

    In every reuse mode the context of a chunk stands where it was computed: all offsets are 0.
    """
    for cut in cuts(runner, context, len(token_ids), chunk=True):
        runner.begin([chunk_rows(token_ids, cut, context, run, start)])


def chunk_rows(
    token_ids: Sequence[int], cut: Cut, context: Sequence[PlacedChunk], run: PageRun, start: int | None = None
) -> StepRows:
    """A cut of a chunk that is computed into ``run``; ``start`` as above. Raises ``ValueError`` for moved context."""
    if any(chunk.offset for chunk in context):
        raise ValueError("context: chunks that a chunk is computed under stand at their computed places")
    pages = tuple(range(run.first, run.first + run.pages))
    behind = sum(chunk.tokens for chunk in context)
    return tail_rows(token_ids, cut, context, pages, start=behind if start is None else start)


def prefill_tail(
    runner: Runner,
    token_ids: Sequence[int],
    context: Sequence[PlacedChunk],
    pages: Sequence[int],
    *,
    start: int,
    slot: int = 0,
) -> Tensor:
    """Computes a tail's KV into ``pages``, from position ``start``; logits (vocabulary,) fp32 of its last token.

    The token of largest logit is drawn in ``slot``, which is opened for that.
    """
    if not token_ids:
        raise ValueError("token_ids: at least one token is needed")
    runner.open(slot, GREEDY)
    for cut in cuts(runner, context, len(token_ids), chunk=False):
        last = cut.first + cut.rows == len(token_ids)
        draw = Draw(slot, 0, start + len(token_ids)) if last else None
        step = runner.begin([tail_rows(token_ids, cut, context, pages, start=start, draw=draw)])
    return step.logits()[0]


def tail_rows(
    token_ids: Sequence[int],
    cut: Cut,
    context: Sequence[PlacedChunk],
    pages: Sequence[int],
    *,
    start: int,
    draw: Draw | None = None,
) -> StepRows:
    """A cut of a prompt's tail, which stands in ``pages`` and at the positions from ``start`` on."""
    sequence = StepSequence(tuple(context), tuple(pages), cut.first, cut.rows, start + cut.first)
    return StepRows(sequence, token_ids[cut.first : cut.first + cut.rows], draw, cut.alone)
