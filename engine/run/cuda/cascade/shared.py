"""The static lists of a step: what chunks its rows read, while its compositions last."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from engine.run.cuda.cascade.items import Groups, items_of
from engine.run.cuda.cascade.ranges import starts_of
from engine.run.cuda.cascade.reads import Ints, PairReads
from engine.run.cuda.cascade.records import HEADER, PAIR, ListShape, check


@dataclass(frozen=True)
class SharedLists:
    """The static blob, and where each row's shared partials begin (rows + 1)."""

    blob: Ints
    row_first: Ints


def shared_lists(reads: PairReads, rows: int, shape: ListShape) -> SharedLists:
    """The static lists of ``reads`` in a step of ``rows`` rows. Raises ``WorkTooLarge``."""
    tokens, count = reads.tokens, reads.count
    split = shape.splits.chunk_splits(tokens)
    pairs, row_first = _shared_pairs(reads, rows, split)
    check("pairs", len(pairs), shape.limits.pairs)
    check("rows", rows, shape.limits.rows)
    check("partials", int(row_first[-1]), shape.limits.partials)
    groups = Groups(starts_of(count)[:-1] * PAIR, count, reads.source, tokens, split, tokens, 0, reads.firsts)
    header, items = items_of(groups, shape, at=HEADER)
    header[0] = rows
    return SharedLists(np.concatenate((header, items, pairs.reshape(-1))), row_first)


def _shared_pairs(reads: PairReads, rows: int, split: Ints) -> tuple[Ints, Ints]:
    """Pair records (pairs, PAIR), read by read, and where each row's partials begin (rows + 1)."""
    pairs = np.zeros((len(reads.row), PAIR), np.int32)
    pairs[:, 0], pairs[:, 1], pairs[:, 2] = reads.row, reads.offset, np.repeat(reads.tokens, reads.count)
    splits_of_pair = np.repeat(-(-reads.tokens // split), reads.count)
    hidden: Ints | int = 0  # splits before the first one that a pair sees some of
    if reads.firsts is not None:
        pairs[:, 4] = reads.firsts
        hidden = reads.firsts // np.repeat(split, reads.count)
        splits_of_pair = splits_of_pair - hidden
    order = np.lexsort((reads.place, reads.row))
    pairs[order, 3] = starts_of(splits_of_pair[order])[:-1]
    pairs[:, 3] -= hidden
    row_splits = np.bincount(reads.row, weights=splits_of_pair, minlength=rows)
    return pairs, starts_of(row_splits.astype(np.int32))
