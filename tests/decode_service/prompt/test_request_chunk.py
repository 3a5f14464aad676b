"""What has come of a chunk: whether it is computed here, and how many of its tokens were reused."""

from __future__ import annotations

import pytest

from decode_service.prompt.request_chunk import ChunkOutcome, Unpublished
from engine.kv.source import KVSource
from tests.decode_service.scheduling.scheduled import FakeClaim, request


@pytest.mark.parametrize(
    ("outcome", "here", "cached"),
    [
        (None, False, 0),
        (ChunkOutcome(KVSource.DEVICE), False, 5),
        (ChunkOutcome(KVSource.STORE), False, 5),
        (ChunkOutcome(KVSource.COMPUTED), False, 0),
        (ChunkOutcome(KVSource.COMPUTED, unpublished=Unpublished.STORE_FULL), True, 0),
        (ChunkOutcome(KVSource.COMPUTED, claim=FakeClaim()), True, 0),
    ],
)
def test_outcomes(outcome: ChunkOutcome | None, here: bool, cached: int) -> None:
    chunk = request("one", [("a", 5)]).composition.chunks[0]
    chunk.outcome = outcome
    assert chunk.cached_tokens == cached and (outcome is not None and outcome.here) == here
    with pytest.raises(AssertionError):
        _ = chunk.held
