"""The prompts of a completion: texts or token ids, behind the documents of the extension."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from cairn import AsyncClient, ChunkRef, Text, Tokens
from cairn.client.requests import Segment
from gateway.api.fields import Fields
from gateway.errors import HttpError, invalid

PROMPTS_MAX = 16

Prompt = str | list[int]


def read_prompts(fields: Fields) -> list[Prompt]:
    """``prompt``: a text, token ids, or a list of either. Raises ``HttpError``."""
    value = fields.take("prompt")
    if isinstance(value, str) or _are_ids(value):
        value = [value]
    if not isinstance(value, list) or not value or not all(isinstance(each, str) or _are_ids(each) for each in value):
        raise invalid("prompt", "must be a string, a list of token ids, or a list of either")
    if len(value) > PROMPTS_MAX:
        raise invalid("prompt", f"has more than {PROMPTS_MAX}")
    if not all(value):
        raise invalid("prompt", "must not be empty")
    return value


def _are_ids(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(type(each) is int for each in value)


def query(prompt: Prompt) -> Segment:
    """A prompt as the last segment of a request."""
    return prompt if isinstance(prompt, str) else Tokens(prompt)


async def document_segments(documents: Sequence[dict[str, Any]], client: AsyncClient) -> list[Segment]:
    """Documents as segments, names looked up. Raises ``HttpError`` or ``CairnError``."""
    return [await _segment(each, f"cairn.documents[{index}]", client) for index, each in enumerate(documents)]


async def _segment(document: dict[str, Any], where: str, client: AsyncClient) -> Segment:
    content = document["content"]
    if isinstance(content, str):
        return Text(content, "context", document["role"])
    if document["role"]:
        raise invalid(f"{where}.role", "a registered chunk has the one that it was registered with; leave it out")
    (part,) = content
    if "id" in part:
        return ChunkRef(part["id"])
    found, _ = await client.chunks_page(name=part["name"], page_size=2)
    if len(found) != 1:
        many = "several chunks have" if found else "no chunk has"
        raise HttpError(404, f"{where}: {many} this name", param=where, code="not_found")
    return ChunkRef(found[0].id)
