"""The lines of a token file, ``TOKEN [SALT [OPTION ...]]``; empty ones and those that begin with ``#`` are skipped."""

from __future__ import annotations

from collections.abc import Iterator

NO_SALT = "-"  # where options follow


def token_lines(text: str) -> Iterator[tuple[int, list[str]]]:
    """The number and the words of each line that has a token."""
    for number, line in enumerate(text.splitlines(), start=1):
        words = line.split()
        if words and not words[0].startswith("#"):
            yield number, words
