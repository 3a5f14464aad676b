"""What every registry of records agrees on: how large a page may be, and what a cursor is."""

from __future__ import annotations

import base64
import binascii
import json

from chunk_store.store import ChunkRecord, RecordOrder

LIST_LIMIT_MAX = 10_000


def encode_cursor(order: RecordOrder, last: ChunkRecord) -> str:
    """A cursor that continues behind ``last``."""
    value = {
        RecordOrder.CREATED: last.created_at,
        RecordOrder.LAST_USED: last.last_used_at,
        RecordOrder.NAME: last.name,
    }[order]
    return base64.urlsafe_b64encode(json.dumps([order.value, value, last.chunk_id]).encode()).decode()


def decode_cursor(cursor: str, order: RecordOrder) -> tuple[float | str, str]:
    """Sort value and chunk id. Raises ``ValueError`` for a cursor of another order or of no page at all."""
    try:
        parts = json.loads(base64.urlsafe_b64decode(cursor.encode()))
        name, value, chunk_id = parts
    except (ValueError, TypeError, binascii.Error) as error:
        raise ValueError("cursor: not one that list_records returned") from error
    wanted_type = str if order is RecordOrder.NAME else float
    if name != order.value or not isinstance(value, wanted_type) or not isinstance(chunk_id, str):
        raise ValueError(f"cursor: belongs to another order than {order.value}")
    return value, chunk_id
