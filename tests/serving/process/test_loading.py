"""How many pages a pool gets."""

from __future__ import annotations

from typing import Any

import pytest

from chunk_store.layout import KVLayout, LayerLayout
from decode_service.options import DecodeOptions
from engine.run.backends import AttentionRefused, DeviceFacts
from serving.process import loading
from serving.process.loading import pool_pages


def test_a_backend_that_no_model_can_have_is_refused_before_one_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    def not_reached(*_: Any, **__: Any) -> Any:
        raise AssertionError("the weights are not looked at")

    monkeypatch.setattr(loading, "check_model", lambda _: None)
    monkeypatch.setattr("serving.process.loading.BorrowedModel.load", not_reached)
    options = DecodeOptions(model="m", store="file:///s", prefill="h:1", attention="flashinfer")
    with pytest.raises(AttentionRefused, match="attention: flashinfer cannot be used on cpu: the device is cpu; give"):
        loading.load(options)
    without = DeviceFacts(cuda=True, flashinfer="FlashInfer is not installed (pip install 'cairn[gpu]')")
    monkeypatch.setattr("engine.run.choice.device_facts", lambda _: without)
    with pytest.raises(AttentionRefused, match="FlashInfer is not installed"):
        loading.load(options)


def test_pool_pages() -> None:
    layout = KVLayout("float32", (LayerLayout(2, 8, 8),))
    assert pool_pages(layout, 16, 33) == 3
    assert pool_pages(layout, 16, 10**9, nbytes_max=10 * layout.nbytes(16)) == 10
    assert pool_pages(layout, 16, 33, nbytes_max=1) == 1
