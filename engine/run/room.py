"""What one packed step can take, in integers: known before anything is launched.

Rows that decode have a place in every step (``grant``); what is left is for slices of prompts and chunks (``take``),
the first of which gets at least one row, so that prompts go on however full the step is.
"""

from __future__ import annotations

from collections.abc import Sequence

NO_LIMIT = 1 << 62
READS_WHILE_DECODING = 10 << 20  # so that a mixed step takes no longer than about three decode steps


class StepRoom:
    """One step's room, used up as rows are taken.

    ``rows`` of all sequences; ``partials``: partial results of all rows, one for each split of each chunk and of the
    tail; ``reads``: tokens that the rows of slices see, summed over rows. ``chunk_splits`` are (from tokens, tokens of
    a split), ascending, ``tail_split`` tokens.
    """

    def __init__(
        self,
        rows: int,
        *,
        partials: int = NO_LIMIT,
        reads: int = NO_LIMIT,
        chunk_splits: Sequence[tuple[int, int]] = ((0, NO_LIMIT),),
        tail_split: int = NO_LIMIT,
    ) -> None:
        self.rows = rows
        self.partials = partials
        self.reads = reads
        self._chunk_splits = chunk_splits
        self._tail_split = tail_split
        self._sliced = False

    def grant(self, context: Sequence[int], before: int) -> None:
        """Takes a row that decodes, behind chunks of ``context`` tokens each and ``before`` tokens of its tail."""
        self.rows -= 1
        self.partials -= self._shared(context) + self._own(before + 1)

    def take(self, context: Sequence[int], before: int, rows: int) -> int:
        """How many of a sequence's next ``rows`` rows fit, whose chunks have ``context`` tokens each and whose tail
        has ``before`` tokens; takes them. At least one of the first slice, if a row is left."""
        fit = min(rows, self.rows)
        if fit <= 0:
            return 0
        shared, seen = self._shared(context), sum(context) + before
        if fit * (shared + self._own(before + fit)) > self.partials:
            fit = self.partials // (shared + self._own(before + fit))
        if fit * (seen + fit) > self.reads:
            fit = min(fit, self.reads // (seen + fit))
        fit = max(fit, 0 if self._sliced else 1)
        if fit <= 0:
            return 0
        self._sliced = True
        self.rows -= fit
        self.partials -= fit * (shared + self._own(before + fit))
        self.reads -= fit * (seen + fit)
        return fit

    def _shared(self, context: Sequence[int]) -> int:
        """Partial results of a row over its chunks."""
        return sum(-(-tokens // self._split(tokens)) for tokens in context)

    def _split(self, tokens: int) -> int:
        return next(split for start, split in reversed(self._chunk_splits) if start <= tokens)

    def _own(self, tokens: int) -> int:
        return -(-tokens // self._tail_split)
