"""What a prefill service stands on, without a device: whether it hands KV over, and whether it reports pages."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from engine.kv.resident import ResidentChunks
from prefill_service.assembly import assemble, prepare
from prefill_service.options import PrefillOptions
from serving.process.startup import Startup
from tests.fakes import FakeServed, codec, small_pool


@pytest.mark.parametrize("pages", [True, False])
def test_it_reports_pages_unless_somebody_else_does(tmp_path: Path, pages: bool) -> None:
    loaded: Any = SimpleNamespace(served=FakeServed(), model_name="tiny", codec=codec(), startup=Startup())
    parts = prepare(PrefillOptions(model="m", store=f"file://{tmp_path}"), loaded)
    computer: Any = SimpleNamespace(served=loaded.served)
    service = assemble(parts, computer, small_pool(), None, pages=pages)
    exported = {sample.labels.get("owner") for family in service.registry.collect() for sample in family.samples}
    assert ("chunk" in exported) == pages
    parts.store.close()


@pytest.mark.parametrize("hand_over", [True, False])
def test_a_pool_that_cannot_be_shared_is_lent_to_nobody(
    tmp_path: Path, hand_over: bool, caplog: pytest.LogCaptureFixture
) -> None:
    loaded: Any = SimpleNamespace(served=FakeServed(), model_name="tiny", codec=codec(), startup=Startup())
    parts = prepare(PrefillOptions(model="m", store=f"file://{tmp_path}", hand_over=hand_over), loaded)
    assert parts.lender(ResidentChunks(small_pool()), lambda call: call()) is None
    assert ("through the store only" in caplog.text) == hand_over
    parts.store.close()
