"""What is remembered of a store that had no room."""

from __future__ import annotations

import time

import pytest

from chunk_store.tenant import Tenant
from decode_service.kv_source import full_stores
from decode_service.kv_source.full_stores import FullStores


def test_a_tenant_is_remembered_for_a_while_and_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    full, one, two = FullStores(), Tenant("one"), Tenant("two")
    full.note(one)
    assert one in full and two not in full
    now += full_stores.FULL_FOR_S / 2
    full.note(two)
    now += full_stores.FULL_FOR_S / 2
    assert one not in full and two in full
    assert list(full._until) == [two]
