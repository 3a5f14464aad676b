"""Items of groups of pairs: which tiles go over which splits, and of which class they are."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from engine.run.cuda.cascade.ranges import ranges_of, starts_of
from engine.run.cuda.cascade.reads import Ints
from engine.run.cuda.cascade.records import (
    AT_COUNTS,
    AT_ITEMS,
    CLASSES_MAX,
    HEADER,
    ITEM,
    PAIR,
    ListShape,
    Tiles,
    check,
)


@dataclass(frozen=True)
class Groups:
    """Pairs that read the same tokens; arrays over groups. ``source`` is the first slot, or ~(page index)."""

    pair_at: Ints  # index into the blob of the group's first pair
    pairs: Ints
    source: Ints
    tokens: Ints
    split: Ints
    visible: Ints  # where what the group's first pair sees ends; each later pair sees ``step`` more
    step: int
    firsts: Ints | None = None  # the first token that each pair sees, in the order of the blob; None: token 0, all

    @property
    def pair(self) -> Ints:
        """The number of each group's first pair among all pairs of the blob."""
        return self.pair_at // PAIR


def items_of(groups: Groups, shape: ListShape, *, at: int) -> tuple[Ints, Ints]:
    """A header and the items, which begin at ``at`` in the buffer and are followed by the pairs."""
    packed = groups.pairs * shape.ratio
    tallest = np.full(len(packed), shape.chunk_tiles[-1][0], np.int32)
    if groups.step:
        tallest = np.where(groups.pairs == 1, shape.row_tiles[-1][0], shape.long_tiles[-1][0]).astype(np.int32)
    tile_counts = -(-packed // tallest)
    split_counts = -(-groups.tokens // groups.split)
    hidden = _hidden_splits(groups)
    units = tile_counts * (split_counts - hidden)
    group = np.repeat(np.arange(len(packed)), units)
    local = ranges_of(np.zeros_like(packed), units)
    split, tile = local // tile_counts[group], local % tile_counts[group]
    if groups.firsts is not None:
        split += hidden[group]
    row0 = tile * tallest[group]
    left = np.minimum(packed[group] - row0, tallest[group])
    first_pair, last_pair = row0 // shape.ratio, (row0 + left - 1) // shape.ratio
    begin = split * groups.split[group]
    end = np.minimum(groups.tokens[group], begin + groups.split[group])
    fields = np.empty((len(group), ITEM), np.int32)
    fields[:, 1], fields[:, 2], fields[:, 3] = row0, packed[group], groups.source[group]
    fields[:, 4], fields[:, 7], fields[:, 8] = begin, split, begin
    if groups.firsts is not None:
        least, most = _extremes(groups.firsts, groups.pair[group] + first_pair, groups.pair[group] + last_pair)
        fields[:, 4] = begin = np.clip(least, begin, end)
        fields[:, 8] = np.clip(most, begin, end)
    fields[:, 5] = np.clip(groups.visible[group] + groups.step * first_pair, begin, end)
    fields[:, 6] = np.clip(groups.visible[group] + groups.step * last_pair, begin, end)
    kind = _class_of(shape.long_tiles if groups.step else shape.chunk_tiles, left)
    if groups.step:
        kind = np.where(groups.pairs[group] == 1, _class_of(shape.row_tiles, left), kind)
    if groups.step or groups.firsts is not None:
        seen = fields[:, 6] > begin  # by some row of the tile
        fields, kind, group = fields[seen], kind[seen], group[seen]
    check("items", len(fields), shape.limits.items)
    fields[:, 0] = at + len(fields) * ITEM + groups.pair_at[group]
    order = np.lexsort((fields[:, 4] - fields[:, 6], kind)) if groups.step else np.argsort(kind, kind="stable")
    counts = np.bincount(kind, minlength=CLASSES_MAX)
    header = np.zeros(HEADER, np.int32)
    header[AT_COUNTS : AT_COUNTS + CLASSES_MAX] = counts
    header[AT_ITEMS : AT_ITEMS + CLASSES_MAX] = at + starts_of(counts)[:-1] * ITEM
    return header, fields[order].reshape(-1)


def _hidden_splits(groups: Groups) -> Ints:
    """Splits of each group before the first one that one of its pairs sees some of."""
    if groups.firsts is None or not len(groups.pairs):
        return np.zeros(len(groups.pairs), np.int32)
    least, _ = _extremes(groups.firsts, groups.pair, groups.pair + groups.pairs - 1)
    return least // groups.split


def _extremes(values: Ints, first: Ints, last: Ints) -> tuple[Ints, Ints]:
    """The least and the largest of values[first[i]] .. values[last[i]], each i."""
    ends = np.empty(2 * len(first), np.intp)
    ends[::2], ends[1::2] = first, last + 1
    padded = np.append(values, np.int32(0))
    return np.minimum.reduceat(padded, ends)[::2], np.maximum.reduceat(padded, ends)[::2]


def _class_of(tiles: Tiles, rows: Ints) -> Ints:
    """The class of the lowest tile that holds ``rows`` packed rows."""
    heights, classes = (np.array(column, np.int32) for column in zip(*tiles, strict=True))
    return classes[np.minimum(np.searchsorted(heights, rows), len(classes) - 1)]
