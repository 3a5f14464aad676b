"""Where an answer stands in its grammar: which tokens may come next, and which must."""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Sequence

import numpy as np
from llguidance import LLExecutor, LLMatcher
from numpy.typing import NDArray

Bits = NDArray[np.int32]


class GrammarFailed(ValueError):
    """A grammar turned out to be too complex on the way."""


class Matcher:
    """Where one answer stands in its grammar. One thread at a time; ``is_over``: nothing can come any more."""

    def __init__(self, state: LLMatcher, ends: Collection[int]) -> None:
        """``ends``: tokens that end an answer for the grammar, and are not to come unless nothing else can."""
        self._state = state
        self._ends = tuple(ends)
        self._forced: deque[int] = deque()
        self.is_over = False
        self._look()

    def accept(self, token_id: int) -> None:
        """A token was drawn that the mask allowed. Raises ``GrammarFailed`` if the grammar is too complex to go on."""
        if not self._state.consume_token(token_id):
            raise GrammarFailed(words_of(self._state.get_error()))
        if self._forced:
            self._forced.popleft()
        self.is_over = self._state.is_stopped()
        self._look()

    def forced(self) -> list[int]:
        """The tokens that come next whatever is drawn; empty if there is a choice."""
        return list(self._forced)

    def _look(self) -> None:
        """Kept until they have come, so that one at a time gives what all at once would."""
        if not self._forced and not self.is_over:
            self._forced += self._state.compute_ff_tokens()

    def fill(self, row: Bits) -> None:
        """Writes which tokens may come next: (ceil(vocabulary / 32),) int32, the lowest bit first."""
        fill_rows([self], row[None], None)

    def _fill_forced(self, row: Bits) -> bool:
        if self._forced:
            row[:] = 0
            row.view(np.uint32)[self._forced[0] // 32] = 1 << self._forced[0] % 32
        return bool(self._forced)

    def _settle(self, row: Bits) -> None:
        """Behind the mask of the grammar: the end tokens that are none here. Raises ``GrammarFailed``."""
        if self._state.is_error():
            raise GrammarFailed(words_of(self._state.get_error()))
        if not self._ends:
            return
        words = row.view(np.uint32)
        before = [(token // 32, words[token // 32]) for token in self._ends]
        for token in self._ends:
            words[token // 32] &= ~np.uint32(1 << token % 32)
        if not words.any():
            for word, bits in before:
                words[word] |= bits


def fill_rows(
    matchers: Sequence[Matcher | None], rows: Bits, executor: LLExecutor | None
) -> list[GrammarFailed | None]:
    """Writes a mask for each matcher into its row, in parallel; every token may come where there is no matcher.

    ``rows`` (matchers, ceil(vocabulary / 32)) int32, contiguous. What failed is told by place, and may draw anything.
    """
    there = [
        (matcher, index)
        for index, matcher in enumerate(matchers)
        if matcher is not None and not matcher.is_over and not matcher._fill_forced(rows[index])
    ]
    for index, matcher in enumerate(matchers):
        if matcher is None or matcher.is_over:
            rows[index] = -1
    nbytes = rows.shape[1] * 4
    if executor is not None and len(there) > 1:
        executor.unsafe_compute_mask_ptr(
            [(matcher._state, index) for matcher, index in there], rows.ctypes.data, nbytes, len(rows)
        )
    else:
        for matcher, index in there:
            matcher._state.unsafe_compute_mask_ptr(rows[index].ctypes.data, nbytes)
    failed: list[GrammarFailed | None] = [None] * len(matchers)
    for matcher, index in there:
        try:
            matcher._settle(rows[index])
        except GrammarFailed as error:
            failed[index] = error
            rows[index] = -1
    return failed


def words_of(error: str) -> str:
    """The library's own words, without its mark that it has more of them."""
    return error.replace("\n<non-verbose/>", "").strip()
