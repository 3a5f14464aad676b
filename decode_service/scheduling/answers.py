"""Answers to one prompt: its tail is computed once, by the first of them that is admitted.

    first     tail computed ................ | first token | ...
    others    ... wait, their pages empty .. | tail copied, first token drawn from the same row | ...

What is drawn from a row follows from the row and the request's seed, so each has the answer that it would have alone.
Who is admitted later computes the tail itself; so does who bypasses the caches, since its chunks are its own, too.
"""

from __future__ import annotations

from collections.abc import Iterable
from collections.abc import Sequence as Items
from dataclasses import replace

from decode_service.scheduling.sequence import Sequence
from decode_service.scheduling.step_plan import Rows


def who_computes(prefilling: Iterable[Sequence]) -> list[Sequence]:
    """Those whose rows may run: of answers to one prompt the first that has rows of it left, if the others can wait."""
    computing: set[object] = set()
    found: list[Sequence] = []
    for sequence in prefilling:
        if sequence.prompt in computing and _takes_over(sequence):
            continue
        if sequence.tail_tokens < len(sequence.composition.tail) and not (sequence.generated or sequence.bypass):
            computing.add(sequence.prompt)
        found.append(sequence)
    return found


def with_others(rows: Items[Rows], prefilling: Items[Sequence]) -> list[Rows]:
    """The rows, those that end a prompt with the other answers to it that wait."""
    return [replace(each, also=_waiting_for(each, prefilling)) if each.last_of_prompt else each for each in rows]


def _waiting_for(rows: Rows, prefilling: Items[Sequence]) -> tuple[Sequence, ...]:
    first = rows.sequence
    if first.bypass or first.generated:
        return ()
    there = (other for other in prefilling if other.prompt is first.prompt and other is not first)
    return tuple(other for other in there if _takes_over(other))


def _takes_over(sequence: Sequence) -> bool:
    """Whether a sequence could begin with the tail of another one."""
    return not (sequence.bypass or sequence.generated or sequence.tail_tokens)
