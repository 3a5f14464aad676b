"""Capacity arithmetic: agrees with what the store really writes, and with the table in docs/scaling.md."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest

from chunk_store.format.header import header_nbytes
from chunk_store.layout import KVLayout, LayerLayout
from chunk_store.tools.capacity import (
    Workload,
    entries_that_fit,
    entry_nbytes,
    load_s,
    plan,
    token_nbytes,
)
from tests.chunk_store.contract import sample

ROOT = Path(__file__).parents[3]
QWEN3_8B = KVLayout("bfloat16", (LayerLayout(8, 128, 128),) * 36)


def test_a_plan_by_hand() -> None:
    layout = QWEN3_8B
    assert token_nbytes(layout) == 36 * 2 * 8 * 128 * 2 == 147_456
    workload = Workload(
        documents=10_000,
        tokens_per_document=1000,
        contexts=2,
        tokens_loaded=4000,
        requests_per_s=5,
        resident=0.5,
        load_s_max=0.2,
        prefill_tokens_per_s=10_000,
    )
    found = plan(layout, workload)
    assert found.entry_nbytes == entry_nbytes(layout, 1000) == 147_456_000 + 8_192
    assert found.store_nbytes == 20_000 * found.entry_nbytes
    assert found.first_token_rate == pytest.approx(4000 * 147_456 / 0.2)
    assert found.sustained_rate == pytest.approx(5 * 0.5 * 4000 * 147_456)
    assert found.network_rate == found.first_token_rate
    assert found.break_even_rate == pytest.approx(1_474_560_000)
    assert load_s(layout, 4000, found.first_token_rate) == pytest.approx(0.2)
    assert plan(layout, replace(workload, prefill_tokens_per_s=0)).break_even_rate is None


@pytest.mark.parametrize("tokens", [1, 16, 500, 1000, 5000])
def test_an_entry_takes_what_the_plan_says(tokens: int) -> None:
    layout = KVLayout("bfloat16", (LayerLayout(4, 32, 32),) * 6)
    header = sample(1, tokens=tokens, context=[sample(2).key], layout=layout).header
    written = header_nbytes(header) + header.nbytes
    assert abs(entry_nbytes(layout, tokens) - written) <= 4096


def test_how_many_fit() -> None:
    layout = QWEN3_8B
    one = entry_nbytes(layout, 1000)
    assert entries_that_fit(layout, 1000, 10 * one) == 10
    assert entries_that_fit(layout, 1000, 10 * one - 1) == 9


@pytest.mark.parametrize("wrong", [{"documents": 0}, {"resident": 1.5}, {"load_s_max": 0}, {"requests_per_s": -1}])
def test_a_workload_has_limits(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        Workload(**{"documents": 1, "tokens_per_document": 1, **wrong})  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="bytes_per_s"):
        load_s(QWEN3_8B, 1, 0)


def test_the_table_in_the_documentation_is_computed_by_this_module() -> None:
    text = (ROOT / "docs" / "scaling.md").read_text()
    rows = re.findall(
        r"^\| ([\w.\- ]+?) \| (\d+) \| (\d+) \| (\d+) \| ([\d ]+) \| ([\d.]+) \| ([\d.]+) \|$", text, re.M
    )
    assert len(rows) >= 8
    for name, layers, heads, width, token, thousand, gigabytes in rows:
        layout = KVLayout("bfloat16", (LayerLayout(int(heads), int(width), int(width)),) * int(layers))
        assert token_nbytes(layout) == int(token.replace(" ", "")), name
        assert float(thousand) == pytest.approx(entry_nbytes(layout, 1000) / 1e6, rel=0.01), name
        found = plan(layout, Workload(1, 1, tokens_loaded=8000, load_s_max=0.1))
        assert float(gigabytes) == pytest.approx(found.first_token_rate / 1e9, rel=0.01), name
