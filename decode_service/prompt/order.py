"""The order in which a prompt's chunks stand, for callers who do not care: the one that most prompts have in common.

In EXACT a chunk's KV is of all chunks before it, so prompts share what their beginnings share. What is used often
therefore comes first. It is sorted here and not by clients: use is known to the store, by tenant, and every client of
every replica gets the same order.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from enum import StrEnum
from itertools import groupby

from chunk_store.key import ChunkId, ChunkType
from decode_service.prompt.request_chunk import Segment

MOVABLE = frozenset({ChunkType.SYSTEM_PROMPT, ChunkType.CONTEXT, ChunkType.CODE, ChunkType.RAG_RESULT})


class ChunkOrder(StrEnum):
    GIVEN = "given"
    CANONICAL = "canonical"


def use_level(uses: int) -> int:
    """How often a chunk is used, in quarter octaves: 1, 2, .. 6, 7..8, 9, 10..11, ... 108..128 uses are a level each.

    Coarse, so that an order lasts; finer than that gains nothing, coarser costs (``bench.chunk_orders``).
    """
    return (uses**4 - 1).bit_length() if uses else -1


def canonical_order(
    segments: Sequence[Segment], held: Sequence[bool], uses_of: Callable[[Sequence[ChunkId]], Sequence[int]]
) -> tuple[int, ...]:
    """The indices of ``segments`` in the order in which they are used.

    Neighbours of one type change places among each other: the most used first, of one level by chunk id. What is
    ``held`` (a turn of a chat), a query, and the last segment stay where they are; nothing passes them. So does all
    that stands before a turn that was kept: it was answered in that order, and has KV under no other.
    """
    last = len(segments) - 1
    answered = max((index for index, segment in enumerate(segments) if segment.type is ChunkType.TURN), default=-1)

    def run_of(index: int) -> tuple[ChunkType, int]:
        """What neighbours that may change places have in common."""
        moves = segments[index].type in MOVABLE and not held[index] and answered < index < last
        return segments[index].type, -1 if moves else index

    runs = [list(run) for _, run in groupby(range(len(segments)), run_of)]
    moving = sorted({segments[index].chunk_id for run in runs if len(run) > 1 for index in run})
    levels = dict(zip(moving, map(use_level, uses_of(moving)), strict=True)) if moving else {}

    def place(index: int) -> tuple[int, ChunkId]:
        return -levels[segments[index].chunk_id], segments[index].chunk_id

    return tuple(index for run in runs for index in (sorted(run, key=place) if len(run) > 1 else run))
