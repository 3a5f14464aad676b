"""Numbers of rows that steps are padded to."""

from __future__ import annotations

from collections.abc import Sequence


def buckets_up_to(rows: int, sizes: Sequence[int]) -> tuple[int, ...]:
    """Of ``sizes`` those up to the first that holds ``rows`` rows, ascending; all if none does."""
    ordered = sorted(set(sizes))
    largest = next((size for size in ordered if size >= rows), ordered[-1])
    return tuple(size for size in ordered if size <= largest)


def draw_rows(buckets: Sequence[int], slots: int) -> int:
    """Rows that the last layer's rest and the head have room for: the first bucket that all slots fit in."""
    fitting = [size for size in buckets if size >= slots]
    if not fitting:
        raise ValueError(f"slots: {slots} are more than the {buckets[-1]} rows of a step")
    return fitting[0]
