"""What a reader compares before it trusts a byte."""

from __future__ import annotations

import pytest

from chunk_store.blobs import Expected
from chunk_store.errors import BlobBad
from chunk_store.format.header import decode_header
from tests.chunk_store.contract import sample
from tests.chunk_store.format.test_header import GOLDEN, HEADER, golden_parts

SIZES = [len(part) for part in golden_parts()]


def test_the_entry_that_was_asked_for_is_taken() -> None:
    Expected(HEADER.key, list(HEADER.token_ids)).check(decode_header(GOLDEN.read_bytes()), SIZES)


def test_anything_else_is_refused() -> None:
    frame = decode_header(GOLDEN.read_bytes())
    with pytest.raises(BlobBad, match="asked for"):
        Expected(sample(1).key, HEADER.token_ids).check(frame, SIZES)
    with pytest.raises(BlobBad, match="token ids"):
        Expected(HEADER.key, HEADER.token_ids[:-1]).check(frame, SIZES)
    for sizes in (SIZES[:-1], [*SIZES[:-1], SIZES[-1] - 1]):
        with pytest.raises(BlobBad, match="planes"):
            Expected(HEADER.key, HEADER.token_ids).check(frame, sizes)
