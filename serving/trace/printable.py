"""Foreign text as it may stand in a line of ours."""

from __future__ import annotations

MESSAGE_CHARACTERS_MAX = 4096


def printable(text: str, characters_max: int = MESSAGE_CHARACTERS_MAX) -> str:
    """Foreign text as it may stand in a log line or an error: on one line, without control characters, bounded."""
    more = len(text) - characters_max
    text = text[:characters_max]
    if not text.isprintable():
        text = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
    return text if more <= 0 else f"{text}... ({more} more characters)"
