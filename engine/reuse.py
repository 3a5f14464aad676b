"""Reuse modes: which chunks a chunk's tokens attend to, and what follows for keys, places and masks.

mode          context of chunk i        computed at           offset in the composition
EXACT         chunks 0 .. i-1           their total length    0
ANCHORED      chunk 0 (none for i = 0)  len(chunk 0)          start - len(chunk 0)
INDEPENDENT   none                      0                     start
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

import torch
from torch import Tensor

from chunk_store.key import ChunkKey, ModelIdentity, chunk_key
from chunk_store.tenant import SHARED_SALT


class ReuseMode(StrEnum):
    """A choice of context, and nothing else."""

    EXACT = "exact"
    ANCHORED = "anchored"
    INDEPENDENT = "independent"


class Exactness(StrEnum):
    """What the answer equals: plain generation, or generation under the mode's block mask."""

    EXACT_CONTEXT = "exact_context"
    EXACT_BLOCK_MASK = "exact_block_mask"


def context_indices(mode: ReuseMode, index: int) -> range:
    """Which chunks of a composition the tokens of chunk ``index`` attend to besides their own."""
    if mode is ReuseMode.EXACT:
        return range(index)
    if mode is ReuseMode.ANCHORED:
        return range(min(index, 1))
    return range(0)


def exactness(mode: ReuseMode, index: int) -> Exactness:
    """What is exact about chunk ``index``; where mode and EXACT choose the same context they are the same."""
    same = context_indices(mode, index) == range(index)
    return Exactness.EXACT_CONTEXT if same else Exactness.EXACT_BLOCK_MASK


@dataclass(frozen=True)
class KeyedChunk:
    """A chunk of a composition under a mode: its KV's key, where it stands, where it was computed.

    ``shared``: it and all that it attends to are shared content, so its KV is everybody's too.
    """

    key: ChunkKey
    token_ids: tuple[int, ...]
    context: tuple[int, ...]  # indices in the composition
    start: int
    computed_start: int
    shared: bool = False

    @property
    def offset(self) -> int:
        return self.start - self.computed_start


def key_composition(
    model: ModelIdentity,
    chunks: Sequence[tuple[int, ...]],
    mode: ReuseMode,
    salt: str = "",
    shared: Sequence[bool] = (),
) -> list[KeyedChunk]:
    """Keys and places of the chunks of a composition, in order (the query is not among them).

    ``shared`` says which of them are shared content (none without it). KV is salted with ``salt``, unless the chunk
    and its whole context are shared: then it has the same key for every tenant.
    """
    keyed: list[KeyedChunk] = []
    keys: list[ChunkKey] = []
    lengths = [len(token_ids) for token_ids in chunks]
    start = 0
    for index, token_ids in enumerate(chunks):
        context = tuple(context_indices(mode, index))
        everybodys = bool(shared) and shared[index] and all(keyed[i].shared for i in context)
        # A thousand chunks have half a million pairs: ``map`` is what keeps this short.
        before = list(map(keys.__getitem__, context))
        key = chunk_key(model, before, token_ids, SHARED_SALT if everybodys else salt)
        computed_start = sum(map(lengths.__getitem__, context))
        keys.append(key)
        keyed.append(KeyedChunk(key, tuple(token_ids), context, start, computed_start, everybodys))
        start += len(token_ids)
    return keyed


@dataclass(frozen=True)
class MaskedSequence:
    """What a mode's answer equals, as one plain forward: tokens, positions and who attends to whom.

    ``source`` (rows,) picks each row's token from the concatenated composition; ``allowed`` is bool
    (rows, rows). The last rows are the query's, so the last row's logits predict the first generated token.
    """

    source: Tensor
    positions: Tensor
    allowed: Tensor


def masked_sequence(lengths: Sequence[int], mode: ReuseMode) -> MaskedSequence:
    """The plain forward that a mode stands for. ``lengths``: tokens of each chunk and, last, of the query.

    A chunk attends to its context at the distance at which it was computed. An anchored chunk that stands
    further on therefore sees the first chunk directly before itself: it has a copy of the anchor of its own,
    which nobody else attends to:

        sys            0 .. a-1        anchored doc 1   a ..
        copy of sys    offset ..       anchored doc 2   a + offset ..      (offset = tokens of doc 1)
    """
    starts = [sum(lengths[:i]) for i in range(len(lengths))]
    spans: list[tuple[int, int, int]] = []  # first token, tokens, first position
    sees: list[list[int]] = []  # indices into spans
    place: list[int] = []  # span of each chunk
    for index, (start, length) in enumerate(zip(starts, lengths, strict=True)):
        last = index == len(lengths) - 1
        context = range(index) if last else context_indices(mode, index)
        offset = 0 if last else start - sum(lengths[i] for i in context)
        seen = [place[i] for i in context]
        if offset and seen:
            seen = []
            for i in context:
                spans.append((starts[i], lengths[i], starts[i] + offset))
                sees.append(list(seen))
                seen.append(len(spans) - 1)
        place.append(len(spans))
        spans.append((start, length, start))
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
