"""Documents of completions: nothing that is asked for is ignored."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest

from cairn import ChunkRef
from gateway.api.extension import read_extension
from gateway.api.fields import Fields
from gateway.api.prompts import document_segments
from gateway.errors import HttpError

NAME = "e" * 64


def segments(document: dict[str, Any]) -> Any:
    documents = read_extension(Fields({"documents": [document]}, "cairn")).documents
    return asyncio.run(document_segments(documents, SimpleNamespace()))  # type: ignore[arg-type]


def test_a_registered_chunk_takes_no_other_role() -> None:
    assert segments({"id": NAME}) == [ChunkRef(NAME)]
    for way in ("id", "name"):
        with pytest.raises(HttpError) as refused:
            segments({way: NAME, "role": "user"})
        assert refused.value.param == "cairn.documents[0].role"
