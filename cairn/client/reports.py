"""What a service says of its own work: counts, times, and where the KV of each segment came from."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Timings:
    """Seconds that each stage of a request took, by the service's clock; 0 where a stage did not happen."""

    queue_s: float = 0.0
    tokenize_s: float = 0.0
    lookup_s: float = 0.0
    prefill_s: float = 0.0
    publish_s: float = 0.0
    load_s: float = 0.0
    forward_s: float = 0.0
    first_token_s: float = 0.0
    decode_s: float = 0.0
    total_s: float = 0.0


@dataclass(frozen=True)
class Usage:
    """Token counts; ``prompt_tokens = cached_tokens + computed_tokens``."""

    prompt_tokens: int
    cached_tokens: int
    computed_tokens: int
    completion_tokens: int


@dataclass(frozen=True)
class SegmentReport:
    """Where the KV of one segment of the prompt came from. ``offset`` is where it stands minus where it was
    computed, in tokens; ``miss_reason`` is empty for a hit. ``unpublished`` says why KV that was computed did not go
    to the store (``"store_full"``, ``"store_unavailable"``), empty otherwise. ``given_index`` is its place among the
    segments that were sent."""

    chunk_id: str
    name: str
    type: str
    tokens: int
    cached_tokens: int
    source: str
    level: int
    offset: int
    exactness: str
    miss_reason: str
    unpublished: str = ""
    given_index: int = 0


@dataclass(frozen=True)
class ReuseReport:
    """What was reused, segment by segment, and how exact the answer is: the weakest of the segments.

    The segments stand in the order in which they were used; ``reordered``: that is not the one they were sent in.
    """

    reuse_mode: str
    exactness: str
    segments: tuple[SegmentReport, ...]
    order: str = ""
    reordered: bool = False


@dataclass(frozen=True)
class ChatReport:
    """How a chat became chunks: into how many ``pieces`` its rendering was cut, how many answers stand as they were
    generated (``turns_kept``), and why earlier ones were rendered anew (``rendered_again``, "" if none was).

    ``tool_calls_broken``: something began like a tool call and did not end as one; what is in no call is in the text.
    """

    pieces: int
    turns_kept: int
    rendered_again: str
    tool_calls_broken: bool = False
