"""Whether an answer is streamed, and what its stream brings."""

from __future__ import annotations

from dataclasses import dataclass

from gateway.api.fields import Fields
from gateway.errors import invalid


@dataclass(frozen=True)
class Streaming:
    """``usage``: a last event counts tokens."""

    stream: bool
    usage: bool


def read_streaming(fields: Fields) -> Streaming:
    """``stream`` and ``stream_options``. Raises ``HttpError``."""
    stream = bool(fields.boolean("stream"))
    options = fields.object("stream_options")
    if options is None:
        return Streaming(stream, False)
    if not stream:
        raise invalid("stream_options", "belongs to stream: true")
    usage = bool(options.boolean("include_usage"))
    options.only("include_obfuscation", False, why="is not served")
    options.end()
    return Streaming(stream, usage)
