"""Where the KV of a chunk came from: one vocabulary for the host tier, both services, metrics and reports."""

from __future__ import annotations

from enum import StrEnum


class KVSource(StrEnum):
    """Where the KV of a chunk came from for one request."""

    DEVICE = "device"
    HOST = "host"
    STORE = "store"
    COMPUTED = "computed"
