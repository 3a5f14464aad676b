"""The one pool of one process: sized once, with room for what both services keep there."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from cairn.local.together.assembly import pool_size
from decode_service.options import DecodeOptions
from prefill_service.options import PrefillOptions
from tests.fakes import FakeServed


@pytest.mark.parametrize(
    ("prefill", "decode", "pages", "chunk_pages"),
    [
        (
            None,
            None,
            8 * 6,
            12 + 18,
        ),  # four answers and two contexts of 128 tokens; a quarter for chunks, half the rest
        (None, 40, 40, 10 + 15),
        (None, 400, 400, 16 + 192),
        (30, None, 8 * 6 + 30, 30 + 24),
        (30, 40, 70, 30 + 20),
        (None, 2, 2, 1),
        (None, 1, 1, 0),
    ],
)
def test_chunks_have_their_share_and_what_prefill_needs(
    prefill: int | None, decode: int | None, pages: int, chunk_pages: int
) -> None:
    loaded: Any = SimpleNamespace(served=FakeServed(context_length_max=128))
    told: dict[str, Any] = {"model": "m", "store": "file:///s"}
    of_decode = DecodeOptions(**told, prefill="", kv_pages=decode, batch_max=4)
    size = pool_size(PrefillOptions(**told, kv_pages=prefill), of_decode, loaded)
    assert (size.pages, size.chunk_pages) == (pages, chunk_pages)
