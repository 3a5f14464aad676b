"""What both services refuse of what a request names."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import pytest

from chunk_store.key import ChunkId, ChunkType, TokenizerIdentity
from chunk_store.record import ChunkRecord
from engine.reuse import ReuseMode
from serving.errors import InvalidRequest, NotFound, Unsupported
from serving.resolving import check_mode, check_vocabulary, readable

OURS = TokenizerIdentity("a" * 64)
RECORD = ChunkRecord(ChunkId("c1"), OURS, ChunkType.CONTEXT, (1, 2, 3))


def test_a_record_is_readable_by_its_own_tokenizer() -> None:
    assert readable(RECORD, "c1", "chunk_id", OURS) is RECORD
    with pytest.raises(Unsupported, match=r"chunk_id: chunk c1 was registered under tokenizer a.*, this service has b"):
        readable(RECORD, "c1", "chunk_id", TokenizerIdentity("b" * 64))


def test_what_is_not_there_says_field_and_remedy() -> None:
    with pytest.raises(NotFound) as caught:
        readable(None, "feed", "segments[2].chunk_id", OURS)
    error = caught.value
    assert error.message.startswith("segments[2].chunk_id: no chunk 'feed'") and "PrefillChunk" in error.remedy
    assert error.field == "segments[2].chunk_id" and not error.retry


def test_token_ids_are_the_model_s() -> None:
    check_vocabulary(383, "token_ids", 384)
    with pytest.raises(InvalidRequest, match=r"token_ids: token id 384 .*0\.\.383"):
        check_vocabulary(384, "token_ids", 384)


def test_a_mode_that_the_model_fails() -> None:
    refusals = {ReuseMode.EXACT: "", ReuseMode.ANCHORED: "the scaling depends on the length"}
    served = cast(Any, SimpleNamespace(refusals=refusals, borrowed=SimpleNamespace(name="tiny")))
    check_mode(served, ReuseMode.EXACT)
    with pytest.raises(Unsupported, match=r"reuse_mode: anchored .* tiny: the scaling .*; use exact"):
        check_mode(served, ReuseMode.ANCHORED)
