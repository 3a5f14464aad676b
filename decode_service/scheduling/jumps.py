"""Tokens that a grammar forces: several rows of one answer in a step, where rows of one sequence may share it.

    drawn, launched   ... t |          the token behind t is drawn, and only f1 may come
    known             f1 f2 f3 |       what the grammar lets come behind t
    next step         f1 f2 f3 -> draw instead of f1 -> draw, f2 -> draw, f3 -> draw

They are the tokens that one-token masks would give, one at a time, so an answer is the same wherever there is room.
Where rows of a sequence have the same bits in any step, so is its KV. Not where a log-probability of each token was
asked for, nor where penalties count the tokens that are drawn.
"""

from __future__ import annotations

from collections.abc import Sequence as Items
from dataclasses import replace

from decode_service.scheduling.sequence import Sequence
from decode_service.scheduling.step_plan import Forwards, PagesFor, Rows
from engine.run.room import StepRoom

JUMP_MAX = 64  # tokens of one answer in one step


def with_forced(rows: Items[Rows], forwards: Forwards, room: StepRoom, pages_for: PagesFor) -> list[Rows]:
    """The rows of a step, those that decode with what their grammars force, as far as ``room`` is left for it.

    ``pages_for``: how many tokens a tail may have, of so many that it is to have.
    """
    if forwards.alone(1, chunk=False):
        return list(rows)
    may = [each.decodes and each.sequence.grammar is not None for each in rows]
    return [_jumping(each, room, pages_for) if jumps else each for each, jumps in zip(rows, may, strict=True)]


def _jumping(rows: Rows, room: StepRoom, pages_for: PagesFor) -> Rows:
    forced = forced_next(rows.sequence)
    if not forced:
        return rows
    most = pages_for(rows.sequence, rows.first + 1 + len(forced)) - rows.first - 1
    count = room.take(rows.context, rows.first + 1, most) if most > 0 else 0
    return replace(rows, count=1 + count, forced=forced[:count]) if count else rows


def forced_next(sequence: Sequence) -> tuple[int, ...]:
    """The tokens that come behind the one that was drawn last, or is being drawn, whatever the model says."""
    params, grammar = sequence.params, sequence.grammar
    if grammar is None or params.logprobs or params.penalises:
        return ()
    unread = sequence.drawn - len(sequence.generated)
    most = min(params.max_tokens - sequence.drawn - 1, JUMP_MAX)
    return tuple(grammar.forced()[unread:][: max(0, most)])
