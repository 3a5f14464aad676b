"""Log-probabilities of a prompt's tokens: which row of what is computed says which of them.

    chunk    a  b  c     the rows of a and b say b and c; c's row says the first token of what stands behind it
    chunk    d  e        in exact d, under c; in anchored d, under the first chunk's last token; in independent nothing
    query    f  g        e's row says f, as that was computed

A token's log-probability is what the row directly before it says, of those that it attends to. Rows of cached chunks
are not computed, so a request that wants this computes its prompt itself.
"""

from __future__ import annotations

from collections.abc import Sequence

from decode_service.prompt.composition import Composition
from engine.sampling.params import Choice, Scored


class PromptScores:
    """What is wanted of a composition's tokens, and what was found; ``top`` of the likeliest with each."""

    def __init__(self, composition: Composition, top: int) -> None:
        self.top = top
        self._tokens = composition.token_ids()
        self._parts = [segment.token_ids for segment in composition.segments]
        self._starts = [sum(map(len, self._parts[:index])) for index in range(len(self._parts))]
        self._has_query = composition.query is not None
        # Of each part the places of the tokens that its last row says.
        self._behind: list[list[int]] = [[] for _ in self._parts]
        for chunk in composition.chunks:
            if chunk.context:
                self._behind[chunk.context[-1]].append(self._starts[chunk.index])
        if self._has_query and composition.chunks:
            self._behind[-2].append(self._starts[-1])
        self._found: dict[int, Choice] = {}
        self._wanted = sum(len(part) - 1 for part in self._parts) + sum(map(len, self._behind))

    def wanted(self, chunk: int | None, first: int, count: int) -> tuple[Scored | None, list[int]]:
        """What is wanted of ``count`` rows from ``first`` on of a chunk, or of the tail, and its places in the prompt.

        None if nothing is. The tail of a prompt whose last chunk is its query says nothing of the prompt.
        """
        if chunk is None and not self._has_query:
            return None, []
        index = len(self._parts) - 1 if chunk is None else chunk
        places, pairs = list[int](), list[tuple[int, int]]()
        for row in range(first, min(first + count, len(self._parts[index]))):
            last = row + 1 == len(self._parts[index])
            for place in self._behind[index] if last else (self._starts[index] + row + 1,):
                places.append(place)
                pairs.append((row - first, self._tokens[place]))
        return (Scored(tuple(pairs), self.top) if pairs else None), places

    def note(self, places: Sequence[int], scores: Sequence[Choice]) -> None:
        """What was found of the tokens at these places."""
        self._found.update(zip(places, scores, strict=True))

    def all(self) -> list[tuple[int, Choice | None]] | None:
        """Each token of the prompt with what was found, None for one that nothing it attends to stands before.

        None while some of it is missing.
        """
        if len(self._found) < self._wanted:
            return None
        return [(token, self._found.get(place)) for place, token in enumerate(self._tokens)]
