"""Tenants for whose KV the store has no room: for a while it is not asked to take more."""

from __future__ import annotations

import time

from chunk_store.tenant import Tenant

FULL_FOR_S = 5.0  # how long a store that was full is taken to be


class FullStores:
    """Thread-safe; remembers no more tenants than were noted within ``FULL_FOR_S``."""

    def __init__(self) -> None:
        self._until: dict[Tenant, float] = {}  # by the monotonic clock

    def note(self, tenant: Tenant) -> None:
        """The store has just refused this tenant's KV for want of room."""
        self._until[tenant] = time.monotonic() + FULL_FOR_S

    def __contains__(self, tenant: Tenant) -> bool:
        now = time.monotonic()
        for other, until in list(self._until.items()):
            if until <= now:
                self._until.pop(other, None)
        return tenant in self._until
