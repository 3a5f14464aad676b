"""What a reuse mode's answer equals: one plain forward under a block mask. For checks and training, not for serving."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from engine.reuse import ReuseMode, context_indices


@dataclass(frozen=True)
class MaskedSequence:
    """What a mode's answer equals, as one plain forward: tokens, positions and who attends to whom.

    ``source`` (rows,) picks each row's token from the concatenated composition; ``allowed`` is bool
    (rows, rows). The last rows are the query's, so the last row's logits predict the first generated token.
    """

    source: Tensor
    positions: Tensor
    allowed: Tensor


def masked_sequence(lengths: Sequence[int], mode: ReuseMode, starts: Sequence[int] | None = None) -> MaskedSequence:
    """The plain forward that a mode stands for. ``lengths``: tokens of each chunk and, last, of the query.

    They stand from position 0 on without gaps, or at ``starts`` (not before that), the first at 0.

    A chunk attends to its context at the distance at which it was computed. An anchored chunk that stands
    further on therefore sees the first chunk directly before itself: it has a copy of the anchor of its own,
    which nobody else attends to:

        sys            0 .. a-1        anchored doc 1   a ..
        copy of sys    offset ..       anchored doc 2   a + offset ..      (offset = tokens of doc 1)
    """
    sources = [sum(lengths[:i]) for i in range(len(lengths))]
    starts = sources if starts is None else starts
    spans: list[tuple[int, int, int]] = []  # first token, tokens, first position
    sees: list[list[int]] = []  # indices into spans
    place: list[int] = []  # span of each chunk
    for index, (start, length) in enumerate(zip(starts, lengths, strict=True)):
        last = index == len(lengths) - 1
        context = range(index) if last else context_indices(mode, index)
        offset = 0 if last or mode is ReuseMode.EXACT else start - sum(lengths[i] for i in context)
        seen = [place[i] for i in context]
        if offset and seen:
            seen = []
            for i in context:
                spans.append((sources[i], lengths[i], starts[i] + offset))
                sees.append(list(seen))
                seen.append(len(spans) - 1)
        place.append(len(spans))
        spans.append((sources[index], length, start))
        sees.append(seen)
    return _lay_out(spans, sees)


def _lay_out(spans: list[tuple[int, int, int]], sees: list[list[int]]) -> MaskedSequence:
    rows = sum(length for _, length, _ in spans)
    first_rows = [sum(length for _, length, _ in spans[:i]) for i in range(len(spans))]
    allowed = torch.zeros(rows, rows, dtype=torch.bool)
    for index, (_, length, _) in enumerate(spans):
        own = slice(first_rows[index], first_rows[index] + length)
        allowed[own, own] = torch.ones(length, length).tril().bool()
        for seen in sees[index]:
            allowed[own, first_rows[seen] : first_rows[seen] + spans[seen][1]] = True
    source = torch.cat([torch.arange(first, first + length) for first, length, _ in spans])
    positions = torch.cat([torch.arange(at, at + length) for _, length, at in spans])
    return MaskedSequence(source, positions, allowed)
