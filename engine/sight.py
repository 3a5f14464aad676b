"""What rows of a model can see at all, in whichever layer: what lies before it no row to come needs.

Where every layer has a window, that bounds what a sequence keeps however long it gets. Where one layer sees
everything, everything is kept.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate

from engine.plan import Window


@dataclass(frozen=True)
class Sight:
    """The windows of a model's layers, each once; none if some layer sees everything."""

    windows: tuple[Window, ...] = ()

    @classmethod
    def of(cls, layers: Iterable[Window | None]) -> Sight:
        """Of each layer's window."""
        found = dict.fromkeys(layers)
        return cls(tuple(window for window in found if window is not None)) if None not in found else cls()

    @property
    def is_limited(self) -> bool:
        return bool(self.windows)

    @property
    def tokens(self) -> int:
        """The most tokens that a row sees, its own among them. Only where ``is_limited``."""
        return max(window.tokens for window in self.windows)

    @property
    def widest(self) -> Window | None:
        """The window that shows most tokens; None where some layer sees everything."""
        return max(self.windows, key=lambda window: window.tokens, default=None)

    def first(self, position: int) -> int:
        """The first position that a row at ``position``, or one behind it, sees in some layer."""
        return min((window.first(position) for window in self.windows), default=0)

    def unseen(self, lengths: Sequence[int]) -> int:
        """How many of the first chunks of these lengths, which stand from 0 on, no row behind all of them sees."""
        if not self.windows:
            return 0
        first = self.first(sum(lengths))
        return sum(end <= first for end in accumulate(lengths))


EVERYTHING = Sight()
